"""Finds the tokens that end a text: those that a model's files name, by any of their ways, and those that are known by name.

A file may state one end (`<|endoftext|>`, of the documents of pre-training) while the model was taught to close its turns with another
(`<|im_end|>`); a text would then run on to its budget. So, as llama.cpp does, tokens that end a text in every model that has them count
wherever they are. And what the chat template writes right after an assistant's message counts, whatever it is called.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # it takes as long as JAX to import, and nothing needs it before a model is loaded
    from transformers import PreTrainedTokenizerBase


# Llama 3, ChatML, Phi, Gemma, GPT-2 and Qwen, Granite, DeepSeek, Llama 4, Command R, CodeLlama, Kimi, InternLM, StarCoder chats, SmolVLM.
NAMES = (
    *("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>", "<|eot|>", "<|eom|>"),
    *(
        "<\uff5cend\u2581of\u2581sentence\uff5c>",
        "<|END_OF_TURN_TOKEN|>",
        "<EOT>",
        "▁<EOT>",
        "_<EOT>",
        "[EOT]",
        "[EOS]",
        "<eom>",
        "<end_of_utterance>",
    ),
    *("<|end_of_turn|>", "<|return|>", "<|call|>"),
)
# In a vocabulary of words these may be words.
_NAMES_IF_ADDED = ("</s>", "<eos>")
_MARK = "answer-8f1c"


def end_ids(tokenizer: "PreTrainedTokenizerBase", stated: Iterable[int], vocab_size: int) -> tuple[int, ...]:
    """Ids that end a text, in order.

    Args:
      stated: what the model's files say; ids that the model does not have are left out.
    """
    core = tokenizer.backend_tokenizer
    added = {token.content: token_id for token_id, token in core.get_added_tokens_decoder().items()}
    found = set(stated)
    fields = [tokenizer.eos_token, *(tokenizer.init_kwargs.get(name) for name in ("eot_token", "eom_token"))]
    found.update(core.token_to_id(str(token)) for token in (*NAMES, *fields) if token is not None)
    found.update(added.get(name) for name in (*_NAMES_IF_ADDED, _after_an_answer(tokenizer, added)))
    return tuple(sorted(token_id for token_id in found if token_id is not None and 0 <= token_id < vocab_size))


def _after_an_answer(tokenizer: "PreTrainedTokenizerBase", added: Iterable[str]) -> str | None:
    """The token that the chat template writes after an assistant's message, if there is one."""
    if not tokenizer.chat_template:
        return None
    messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": _MARK}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception:  # templates raise whatever jinja2 or their author chose; one that takes no such messages says nothing here
        return None
    rest = text.rpartition(_MARK)[2].lstrip()
    return max((name for name in added if rest.startswith(name)), key=len, default=None) if _MARK in text else None
