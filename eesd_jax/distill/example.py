"""A training example: token ids, and which of them the target wrote; and how it is shown."""

import itertools
from typing import NamedTuple, Protocol

import numpy as np
from transformers import PreTrainedTokenizerBase

from eesd_jax.model.config import ModelConfig

# Around what the target wrote, where an example is shown.
_WRITTEN = "⟦{}⟧"


class Example(NamedTuple):
    """A text to learn from.

    tokens: int32 [n]. response: bool [n], True where the target wrote the token. index: the number of the response in self-generation; -1
    where the text comes from elsewhere.
    """

    tokens: np.ndarray
    response: np.ndarray
    index: int = -1

    @property
    def prompt(self) -> np.ndarray:
        """The tokens before the first one that the target wrote, int32."""
        return self.tokens[: int(np.argmax(self.response))]


class Target(Protocol):
    """What examples are checked against: a `LoadedModel`, of which the params are not needed."""

    config: ModelConfig
    tokenizer: PreTrainedTokenizerBase
    eos_ids: tuple[int, ...]


def show(example: Example, tokenizer: PreTrainedTokenizerBase, limit: int = 160) -> str:
    """An example's text, shortened, for messages; ids that are no tokens are left out."""
    ids = [int(token) for token in example.tokens[:limit] if 0 <= token < len(tokenizer)]
    text = tokenizer.decode(ids)
    return repr(text if len(text) <= limit else f"{text[:limit]}...")


def show_mask(example: Example, tokenizer: PreTrainedTokenizerBase) -> str:
    """An example's whole text, what the target wrote in ⟦ ⟧, special tokens included."""
    runs = itertools.groupby(zip(example.tokens.tolist(), example.response.tolist(), strict=True), key=lambda pair: pair[1])
    texts = ((tokenizer.decode([token for token, _ in run]), written) for written, run in runs)
    return "".join(_WRITTEN.format(text) if written else text for text, written in texts)
