"""Runs a GGUF file's model, by default the built-in one, in transformers + PyTorch (CPU, float32), which this project is compared with."""

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import transformers

from eesd_jax.weights import gguf, hub


def load_model(file: pathlib.Path | None = None) -> transformers.LlamaForCausalLM:
    """Loads the weights of a Llama, as this project reads them, into transformers."""
    source = gguf.GGUFSource(file or hub.fetch_demo())
    config = source.hf_config()
    config["rope_scaling"] = _given(config["rope_scaling"])
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**_given(config))).eval()
    weights = {name: torch.from_numpy(np.array(source.read(name))) for name in source.shapes}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected, (missing, unexpected)
    model.tie_weights()
    return model


def _given(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


@torch.no_grad()
def generate(model: transformers.LlamaForCausalLM, ids: list[int], new_tokens: int) -> list[int]:
    """Generates exactly `new_tokens` tokens greedily; EOS is a token like all others."""
    out = model.generate(torch.tensor([ids]), **_greedy(new_tokens))
    return out[0, len(ids) :].tolist()


@torch.no_grad()
def answer(
    model: transformers.LlamaForCausalLM, ids: list[int], new_tokens: int, eos_ids: Sequence[int], **speculation: int | None
) -> list[int]:
    """Answers greedily with up to `new_tokens` tokens, the EOS that ends the text included.

    Args:
      speculation: options of transformers' `generate`; None for plain decoding.
    """
    tokens = torch.tensor([ids])
    ends = {"eos_token_id": list(eos_ids) or None, "pad_token_id": eos_ids[0] if eos_ids else 0}  # one that is set is not warned of
    out = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=new_tokens, **ends, **_given(speculation)
    )
    return out[0, len(ids) :].tolist()


@torch.no_grad()
def generate_with_gaps(model: transformers.LlamaForCausalLM, ids: list[int], new_tokens: int) -> tuple[list[int], list[float]]:
    """Does what `generate` does, and also returns how far the best logit of each step was above the second best."""
    out = model.generate(torch.tensor([ids]), **_greedy(new_tokens), output_logits=True, return_dict_in_generate=True)
    best_two = torch.cat(out.logits).topk(2).values
    return out.sequences[0, len(ids) :].tolist(), (best_two[:, 0] - best_two[:, 1]).tolist()


def _greedy(new_tokens: int) -> dict[str, Any]:
    return {"do_sample": False, "max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "eos_token_id": None}
