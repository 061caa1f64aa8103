"""Runs a GGUF file's model in llama.cpp (llama-cpp-python, CPU), which this project is compared with."""

import os
import pathlib
from collections.abc import Sequence

import llama_cpp
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding


def load_model(file: pathlib.Path, context: int, *, float32_cache: bool, lookup_tokens: int | None = None) -> llama_cpp.Llama:
    """Loads a model, to run on all cores.

    Args:
      context: tokens that a text can have, its prompt included.
      float32_cache: keys and values in float32; else in llama.cpp's default, float16.
      lookup_tokens: its own speculation, prompt lookup, with so many drafts; None for plain decoding.
    """
    kind = llama_cpp.GGML_TYPE_F32 if float32_cache else llama_cpp.GGML_TYPE_F16
    return llama_cpp.Llama(
        str(file),
        n_ctx=context,
        n_threads=os.cpu_count(),
        n_threads_batch=os.cpu_count(),
        type_k=kind,
        type_v=kind,
        draft_model=LlamaPromptLookupDecoding(num_pred_tokens=lookup_tokens) if lookup_tokens else None,
        verbose=False,
    )


def answer(model: llama_cpp.Llama, ids: list[int], new_tokens: int, eos_ids: Sequence[int]) -> list[int]:
    """Answers greedily with up to `new_tokens` tokens, the EOS that ends the text included."""
    model.reset()  # else it goes on from what the last prompt has in common with this one
    found: list[int] = []
    for token in model.generate(ids, temp=0.0):
        found.append(int(token))
        if len(found) == new_tokens or token in eos_ids:
            break
    return found
