"""From logits to a token and the distribution it was drawn from: temperature, top-k, top-p, min-p, as traced per-row arrays.

Filters keep every token at least as probable as a threshold. The thresholds are exact and found without sorting, by bisection over the
bits of a float32 (as integers they have the order of the floats), so a step costs a few sums over the vocabulary instead of a sort.
Tokens that tie with the last one kept are kept too. All arithmetic is float32.

Axes: B rows, V vocabulary.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from eesd_jax.model import cpu_calls

_BLOCK = 128  # tokens whose probabilities are summed first
_GROUP = 64  # tokens of which the best is found first
_BITS_OF_ONE = 0x3F800000  # of the float32 1.0: the largest probability


class Sampling(NamedTuple):
    """How each row draws; arrays, so that a new value never compiles anything.

    temperature: float32 [B], 0 is greedy. top_k: int32 [B], 0 is off. top_p: float32 [B], 1 is off. min_p: float32 [B], 0 is off.
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array


class Draw(NamedTuple):
    """token: int32 [B]. probs: float32 [B, V], the distribution it was drawn from (a point mass where greedy)."""

    token: jax.Array
    probs: jax.Array


def _largest_threshold(probs_BxV: jax.Array, enough: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """For each row the largest t such that `enough(probs >= t)`: float32 [B, 1].

    Args:
      probs_BxV: float32 [B, V], in [0, 1].
      enough: from a mask bool [B, V] to bool [B, 1]; monotone, and taken to hold for the mask of all.
    """
    bits_BxV = jax.lax.bitcast_convert_type(probs_BxV, jnp.int32)

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        good, bad = bounds
        middle = (good + bad) // 2
        holds = enough(bits_BxV >= middle)
        return jnp.where(holds, middle, good), jnp.where(holds, bad, middle)

    zero = jnp.zeros_like(bits_BxV[:, :1])
    good, _ = jax.lax.fori_loop(0, _BITS_OF_ONE.bit_length(), halve, (zero, zero + _BITS_OF_ONE + 1))
    return jax.lax.bitcast_convert_type(good, jnp.float32)


def _top_k_mask(probs_BxV: jax.Array, top_k_B: jax.Array) -> jax.Array:
    wanted = jnp.where(top_k_B > 0, top_k_B, probs_BxV.shape[-1])[:, None]
    return probs_BxV >= _largest_threshold(probs_BxV, lambda mask: jnp.sum(mask, axis=-1, keepdims=True) >= wanted)


def _top_p_mask(probs_BxV: jax.Array, top_p_B: jax.Array) -> jax.Array:
    # A full sum can fall short of 1 by rounding, so "all of it" is not left to arithmetic.
    wanted = top_p_B[:, None]
    threshold = _largest_threshold(probs_BxV, lambda mask: jnp.sum(jnp.where(mask, probs_BxV, 0), axis=-1, keepdims=True) >= wanted)
    return (probs_BxV >= threshold) | (wanted >= 1)


def best_token(logits: jax.Array) -> jax.Array:
    """The most probable token, of several the first: int32 [...] of logits [..., V]."""
    vocabulary = logits.shape[-1]
    if vocabulary % _GROUP or not cpu_calls.possible():
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    # XLA's argmax for CPU looks at one number after the other, its maximum at many.
    groups = logits.reshape(*logits.shape[:-1], -1, _GROUP)
    group = jnp.argmax(jnp.max(groups, axis=-1), axis=-1)
    chosen = jnp.take_along_axis(groups, group[..., None, None], axis=-2)[..., 0, :]
    return (group * _GROUP + jnp.argmax(chosen, axis=-1)).astype(jnp.int32)


def _greedy(logits_BxV: jax.Array) -> Draw:
    token = best_token(logits_BxV)
    return Draw(token, jax.nn.one_hot(token, logits_BxV.shape[-1], dtype=jnp.float32))


def warp(logits_BxV: jax.Array, sampling: Sampling) -> jax.Array:
    """The distribution that tokens are drawn from: float32 probabilities [B, V], summing to 1; a point mass in greedy rows.

    Args:
      logits_BxV: float32 [B, V].
      sampling: filters apply in the order temperature, top-k, top-p (Holtzman et al. 2020), min-p (Nguyen et al. 2024), as in transformers.
    """
    greedy_Bx1 = sampling.temperature[:, None] == 0
    scaled = (logits_BxV - jnp.max(logits_BxV, axis=-1, keepdims=True)) / jnp.where(greedy_Bx1, 1.0, sampling.temperature[:, None])

    def probs_of(keep: jax.Array) -> jax.Array:
        return jax.nn.softmax(jnp.where(keep, scaled, -jnp.inf), axis=-1)

    everything = jnp.ones(scaled.shape, bool)
    # The bisections are skipped where no row asks for them.
    keep = jax.lax.cond(jnp.any(sampling.top_k > 0), lambda: _top_k_mask(probs_of(everything), sampling.top_k), lambda: everything)
    keep = jax.lax.cond(jnp.any(sampling.top_p < 1), lambda: keep & _top_p_mask(probs_of(keep), sampling.top_p), lambda: keep)
    probs = probs_of(keep)
    keep &= probs >= sampling.min_p[:, None] * jnp.max(probs, axis=-1, keepdims=True)
    return jnp.where(greedy_Bx1, _greedy(logits_BxV).probs, probs_of(keep))


def _reach(weights_BxN: jax.Array, u_B: jax.Array) -> jax.Array:
    """The first place of each row where the cumulative sum goes beyond u, int32 [B]; always one with a positive weight."""
    positive = weights_BxN > 0
    reached = (jnp.cumsum(weights_BxN, axis=1) > u_B[:, None]) & positive
    # Sums round differently in different orders, so u may lie behind the last place: that one is then meant.
    last = weights_BxN.shape[1] - 1 - jnp.argmax(positive[:, ::-1], axis=1)
    return jnp.where(jnp.any(reached, axis=1), jnp.argmax(reached, axis=1), last).astype(jnp.int32)


def pick(keys_B: jax.Array, probs_BxV: jax.Array) -> jax.Array:
    """Draws a token of each row's distribution by its cumulative sum, int32 [B]; it need not be normalised.

    One uniform number a row and two levels of sums: `jax.random.categorical` draws noise for every token of the vocabulary, which on CPU
    takes longer than the blocks of a small model. Tokens of probability 0 are never drawn.
    """
    batch, vocabulary = probs_BxV.shape
    blocks = jnp.pad(probs_BxV, ((0, 0), (0, -vocabulary % _BLOCK))).reshape(batch, -1, _BLOCK)
    sums = jnp.sum(blocks, axis=2)
    u = jax.vmap(jax.random.uniform)(keys_B) * jnp.sum(sums, axis=1)
    block = _reach(sums, u)
    before = jnp.sum(jnp.where(jnp.arange(sums.shape[1]) < block[:, None], sums, 0), axis=1)
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]  # [B, _BLOCK]
    return block * _BLOCK + _reach(inside, u - before)


def sample(keys_B: jax.Array, logits_BxV: jax.Array, sampling: Sampling) -> Draw:
    """Draws one token a row, and returns the distribution it was drawn from.

    Rows are independent: a row's draw depends on its own key, logits and settings alone. Where every row is greedy, nothing is warped.

    Args:
      keys_B: PRNG keys [B], used once.
      logits_BxV: float32 [B, V].
    """

    def draw(_: None) -> Draw:
        probs = warp(logits_BxV, sampling)
        return Draw(pick(keys_B, probs), probs)

    return jax.lax.cond(jnp.all(sampling.temperature == 0), lambda _: _greedy(logits_BxV), draw, None)
