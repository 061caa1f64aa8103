"""Prompts of different lengths as one batch: to which lengths they are padded, and whether they run together or one after the other.

On a CPU a pass over one prompt already waits for arithmetic, so padding all of a batch to its longest prompt costs what it says.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eesd_jax.config import DecodeConfig
from eesd_jax.decode.state import DecodeState, ExitState

# One after the other where that is at most this part of the tokens: a token costs more in small passes, and each length is a program.
_WORTH_IT = 0.8

Prefilled = tuple[DecodeState, ExitState]


def padded_length(config: DecodeConfig, prompt: int) -> int:
    """Tokens that are run for a prompt of so many: a bucket, or whole chunks."""
    chunk = config.prompt_buckets[-1]
    return next((size for size in config.prompt_buckets if prompt <= size), -(-prompt // chunk) * chunk)


def bucket_shapes(config: DecodeConfig, longest_prompt: int, longest_text: int) -> tuple[int, int]:
    """Padded prompt length and cache capacity, in tokens, for a batch: few values, so that few programs are compiled."""
    chunk, padded = config.prompt_buckets[-1], padded_length(config, longest_prompt)
    power = config.min_capacity
    while 2 * power < max(padded, longest_text):
        power *= 2
    capacity = next(size for size in (power, power * 3 // 2, 2 * power) if size >= max(padded, longest_text))
    if padded <= chunk:
        return padded, capacity
    capacity = -(-capacity // chunk) * chunk  # chunks are written whole
    return capacity, capacity


def worth_one_by_one(config: DecodeConfig, lengths: Sequence[int], batch: int) -> bool:
    """Whether running prompts one after the other saves much of what they are padded with together.

    Args:
      lengths: of the prompts, in tokens.
      batch: rows; those that only fill it up are run as one.
    """
    alone = sum(padded_length(config, length) for length in (*lengths, *[1] * (len(lengths) < batch)))
    return alone <= _WORTH_IT * batch * padded_length(config, max(lengths))


def one_by_one(run: Callable[[int], Prefilled], rows: int, batch: int) -> Prefilled:
    """Runs one row after the other.

    Args:
      run: of a row, to its own state.
      rows: how many there are; those behind them, up to `batch`, are all alike.
    """
    state = _copies(run(batch - 1), batch)
    for row in range(min(rows, batch - 1)):
        state = _put(state, run(row), np.int32(row))
    return state


@functools.partial(jax.jit, static_argnames=("batch",))
def _copies(row: Any, batch: int) -> Any:
    """A pytree of arrays [1, ...] to one of arrays [batch, ...]."""
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (batch, *leaf.shape[1:])), row)


@functools.partial(jax.jit, donate_argnames=("batch",))
def _put(batch: Any, row: Any, at: jax.Array) -> Any:
    """Writes a pytree of arrays [1, ...] into one of arrays [B, ...]."""
    return jax.tree.map(lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, at, 0), batch, row)
