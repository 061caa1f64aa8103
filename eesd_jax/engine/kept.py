"""What the target's passes find while they write a text, kept for training (`Kept`), so that no second pass over the text is needed.

Axes: B rows, S capacity in tokens, D hidden, K most probable tokens, n tokens of a text.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Keep:
    """Says what is kept of the passes that write a text (see `Kept`). exit_layer: N. top_tokens: K. dtype: name of the floats' dtype."""

    exit_layer: int
    top_tokens: int
    dtype: str


class Kept(NamedTuple):
    """What the target's passes found at every token: [B, S, ...] on the device, [n - 1, ...] on the host, floats in `Keep.dtype`.

    hidden: [..., D], after block N. last: [..., D], after the final norm. ids: int32 [..., K], the most probable tokens to follow, the most
    probable first. log_probs: [..., K], theirs.

    A text on the host is prompt and response without the last token, which no pass has run. ids and log_probs are 0 before the prompt's
    last token.
    """

    hidden: np.ndarray
    last: np.ndarray
    ids: np.ndarray
    log_probs: np.ndarray


def no_kept(keep: Keep, hidden_size: int, shape: tuple[int, int]) -> Kept:
    """Makes room on the device for what is kept of rows. shape: (B, S)."""
    hidden, top = (*shape, hidden_size), (*shape, keep.top_tokens)
    return Kept(
        hidden=jnp.zeros(hidden, keep.dtype),
        last=jnp.zeros(hidden, keep.dtype),
        ids=jnp.zeros(top, jnp.int32),
        log_probs=jnp.zeros(top, keep.dtype),
    )


def cut(kept: Kept, row: int, prompt: int, length: int) -> Kept:
    """Copies one row's own out of what the host has of all rows, without what earlier texts of that row left in it.

    Args:
      prompt, length: tokens of its prompt, and of prompt and response.
    """
    own = jax.tree.map(lambda leaf: np.array(leaf[row, : length - 1]), kept)
    own.ids[: prompt - 1], own.log_probs[: prompt - 1] = 0, 0
    return own
