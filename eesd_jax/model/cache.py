"""The key/value cache: one array per block and kind, so that a step updates each in place.

A pass only reads the cache and returns the keys and values of its own tokens; they are written once, outside. That keeps caches out of
conditionals (`lax.switch` copies what its branches return) and lets one write serve every block. Nothing is ever erased: a row's
length says what is valid, and masks look at lengths.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from eesd_jax.model.config import ModelConfig
from eesd_jax.model.ops import Operation

# What `hold` makes of new entries: a pytree that only `write` looks into.
Held = Any


class KVCache(NamedTuple):
    """Keys (rotated) and values in the model's dtype, tuples over blocks of [B, K, H, S] and [B, K, S, H]; S is the capacity in tokens.

    Each is in the order in which attention multiplies by it: in another one XLA would copy the whole cache every step.
    The same type with S = T holds the new entries of one pass.
    """

    k: tuple[jax.Array, ...]
    v: tuple[jax.Array, ...]


def empty(config: ModelConfig, batch: int, capacity: int, dtype: jnp.dtype, blocks: int | None = None) -> KVCache:
    """A cache of zeros for `batch` rows of `capacity` tokens, of all the model's blocks or of the number given."""
    blocks = config.num_layers if blocks is None else blocks
    heads = (batch, config.num_kv_heads)
    keys = tuple(jnp.zeros((*heads, config.head_dim, capacity), dtype) for _ in range(blocks))
    values = tuple(jnp.zeros((*heads, capacity, config.head_dim), dtype) for _ in range(blocks))
    return KVCache(keys, values)


@Operation
def hold(entries: KVCache, slots: int) -> Held:
    """Gives new entries one shape, whatever their number of tokens, so that they can leave a conditional.

    Args:
      entries: [B, K, H, T] and [B, K, T, H] of each block, T at most `slots`; there may be no block.
      slots: tokens that there is room for.

    Returns:
      Something for `write`: here entries of `slots` tokens, of which the last are zeros.
    """
    return pad(entries, slots - entries.k[0].shape[3]) if entries.k else entries


def write(cache: KVCache, new: KVCache | Held, start_B: jax.Array, after: jax.Array) -> KVCache:
    """Writes the new entries of one pass of T tokens at each row's own position.

    Args:
      cache: capacity S; `start + T <= S` must hold for every row, because `dynamic_update_slice` clamps and would overwrite live entries.
      new: entries of T tokens, for the same blocks, or what `hold` made of them.
      start_B: int32 [B], the slot of each row's first new entry.
      after: the output of the pass that read the cache (any float array [B, ...]). The write is made to depend on it: XLA, left to choose,
        would write while blocks still read, and copy every cache every step to be able to.
    """
    # Zero, but XLA does not know: it cannot rule out a NaN. Each row looks at its own, so that devices need not tell each other.
    start_B = start_B + jnp.isnan(after[:, *[0] * (after.ndim - 1)]).astype(jnp.int32)
    return write_at(cache, new, start_B)


@Operation
def write_at(cache: KVCache, new: KVCache | Held, start_B: jax.Array) -> KVCache:
    """Writes new entries, or what `hold` made of them, from the slot start_b (int32 [B]) of each row on."""
    keys = tuple(_write_rows(old, entries, start_B, 2) for old, entries in zip(cache.k, new.k, strict=True))
    values = tuple(_write_rows(old, entries, start_B, 1) for old, entries in zip(cache.v, new.v, strict=True))
    return KVCache(keys, values)


@functools.partial(jax.jit, static_argnums=3, inline=True)  # traced once for all blocks
def _write_rows(old: jax.Array, entries: jax.Array, start_B: jax.Array, slot_axis: int) -> jax.Array:
    def write_row(old_row: jax.Array, entry: jax.Array, start: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(old_row, entry, start, slot_axis)

    return jax.vmap(write_row)(old, entries, start_B)


def take(entries: KVCache, slots_BxT: jax.Array) -> KVCache:
    """Of each row's entries those of other slots, int32 [B, T]."""
    slots = slots_BxT[:, None, None]
    keys = tuple(jnp.take_along_axis(k, slots, axis=3) for k in entries.k)
    values = tuple(jnp.take_along_axis(v, slots.swapaxes(2, 3), axis=2) for v in entries.v)
    return KVCache(keys, values)


def pad(entries: KVCache, slots: int) -> KVCache:
    """Adds `slots` empty slots behind the entries."""
    keys = tuple(jnp.pad(k, ((0, 0), (0, 0), (0, 0), (0, slots))) for k in entries.k)
    values = tuple(jnp.pad(v, ((0, 0), (0, 0), (0, slots), (0, 0))) for v in entries.v)
    return KVCache(keys, values)
