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

from eesd_jax.model import ops

_BLOCK = 128  # tokens whose probabilities are summed first
_BITS_OF_ONE = 0x3F800000  # of the float32 1.0: the largest weight


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


class Warped(NamedTuple):
    """Distributions that tokens are drawn from, in a few numbers each, so that they need not be written down to be looked at.

    A token's weight is exp((logit - top) / temperature), which is 1 for the best one; below `floor` it counts as 0. total: the sum of the
    weights. temperature, top, floor, total: float32 [...]. only: int32 [...], the token that has all of the probability, -1 where none has.
    """

    temperature: jax.Array
    top: jax.Array
    floor: jax.Array
    total: jax.Array
    only: jax.Array


def _largest_threshold(weights: jax.Array, enough: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """For each row the largest t such that `enough(weights >= t)`: float32 [...].

    Args:
      weights: float32 [..., V], in [0, 1].
      enough: from a mask bool [..., V] to bool [...]; monotone, and taken to hold for the mask of all.
    """
    bits = jax.lax.bitcast_convert_type(weights, jnp.int32)

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        good, bad = bounds
        middle = (good + bad) // 2
        holds = enough(bits >= middle[..., None])
        return jnp.where(holds, middle, good), jnp.where(holds, bad, middle)

    zero = jnp.zeros_like(bits[..., 0])
    good, _ = jax.lax.fori_loop(0, _BITS_OF_ONE.bit_length(), halve, (zero, zero + _BITS_OF_ONE + 1))
    return jax.lax.bitcast_convert_type(good, jnp.float32)


def _top_k_floor(weights: jax.Array, top_k: jax.Array) -> jax.Array:
    wanted = jnp.where(top_k > 0, top_k, weights.shape[-1])
    return _largest_threshold(weights, lambda mask: jnp.sum(mask, axis=-1) >= wanted)


def _top_p_floor(weights: jax.Array, top_p: jax.Array) -> jax.Array:
    wanted = top_p * jnp.sum(weights, axis=-1)
    floor = _largest_threshold(weights, lambda mask: jnp.sum(jnp.where(mask, weights, 0), axis=-1) >= wanted)
    # A full sum can fall short of another one by rounding, so "all of it" is not left to arithmetic.
    return jnp.where(top_p >= 1, 0, floor)


def _greedy(logits_BxV: jax.Array) -> Draw:
    token = ops.argmax(logits_BxV)
    return Draw(token, jax.nn.one_hot(token, logits_BxV.shape[-1], dtype=jnp.float32))


def warp(logits: jax.Array, sampling: Sampling) -> Warped:
    """The distributions that tokens are drawn from, in few numbers; of greedy rows, point masses.

    Args:
      logits: float32 [..., V].
      sampling: of shapes that broadcast to [...]. Filters apply in the order temperature, top-k, top-p (Holtzman et al. 2020), min-p
        (Nguyen et al. 2024), as in transformers.

    Returns:
      Fields of shape [...].
    """
    sampling = Sampling(*(jnp.broadcast_to(setting, logits.shape[:-1]) for setting in sampling))
    greedy = sampling.temperature == 0
    temperature, top = jnp.where(greedy, 1.0, sampling.temperature), jnp.max(logits, axis=-1)
    none = jnp.zeros_like(top)

    def weights(floor: jax.Array) -> jax.Array:
        return _weights(logits, temperature, top, floor)

    # The bisections are skipped where no row asks for them.
    floor = jax.lax.cond(jnp.any(sampling.top_k > 0), lambda: _top_k_floor(weights(none), sampling.top_k), lambda: none)
    floor = jax.lax.cond(
        jnp.any(sampling.top_p < 1), lambda: jnp.maximum(floor, _top_p_floor(weights(floor), sampling.top_p)), lambda: floor
    )
    floor = jnp.maximum(floor, sampling.min_p)  # of the largest weight, which is 1
    best = jax.lax.cond(jnp.any(greedy), lambda: ops.argmax(logits), lambda: jnp.zeros(top.shape, jnp.int32))
    return Warped(temperature, top, floor, jnp.sum(weights(floor), axis=-1), jnp.where(greedy, best, -1))


def _weights(logits: jax.Array, temperature: jax.Array, top: jax.Array, floor: jax.Array) -> jax.Array:
    """As `Warped` defines them: float32 [..., V]."""
    weights = jnp.exp((logits - top[..., None]) / temperature[..., None])
    return jnp.where(weights >= floor[..., None], weights, 0)


def probabilities(logits: jax.Array, warped: Warped) -> jax.Array:
    """The distributions, written down: float32 [..., V] of logits [..., V]."""
    drawn = _weights(logits, *warped[:3]) / warped.total[..., None]
    return jnp.where(warped.only[..., None] < 0, drawn, jnp.arange(logits.shape[-1]) == warped.only[..., None])


def probability(logits: jax.Array, warped: Warped, token: jax.Array) -> jax.Array:
    """Of one token each, int32 [...]: float32 [...] of logits [..., V]."""
    logit = jnp.take_along_axis(logits, token[..., None], axis=-1)
    drawn = _weights(logit, *warped[:3])[..., 0] / warped.total
    return jnp.where(warped.only < 0, drawn, token == warped.only)


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


def draw(keys: jax.Array, logits: jax.Array, warped: Warped) -> jax.Array:
    """Draws a token of each distribution as `pick` does of one that is written down, int32 [...]; here none is.

    Args:
      keys: PRNG keys [...], used once.
      logits: float32 [..., V].
    """
    shape, vocabulary = keys.shape, logits.shape[-1]
    logits = logits.reshape(-1, vocabulary)
    temperature, top, floor, _, only = jax.tree.map(jnp.ravel, warped)
    padded = jnp.pad(logits, ((0, 0), (0, -vocabulary % _BLOCK)), constant_values=-jnp.inf)
    blocks = padded.reshape(logits.shape[0], -1, _BLOCK)
    sums = jnp.sum(_weights(blocks, *(setting[:, None] for setting in (temperature, top, floor))), axis=2)
    u = jax.vmap(jax.random.uniform)(keys.ravel()) * jnp.sum(sums, axis=1)
    block = _reach(sums, u)
    before = jnp.sum(jnp.where(jnp.arange(sums.shape[1]) < block[:, None], sums, 0), axis=1)
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]  # [N, _BLOCK]
    token = block * _BLOCK + _reach(_weights(inside, temperature, top, floor), u - before)
    return jnp.where(only < 0, token, only).reshape(shape)


def sample(keys_B: jax.Array, logits_BxV: jax.Array, sampling: Sampling) -> Draw:
    """Draws one token a row, and returns the distribution it was drawn from.

    Rows are independent: a row's draw depends on its own key, logits and settings alone. Where every row is greedy, nothing is warped.

    Args:
      keys_B: PRNG keys [B], used once.
      logits_BxV: float32 [B, V].
    """

    def draw(_: None) -> Draw:
        probs = probabilities(logits_BxV, warp(logits_BxV, sampling))
        return Draw(pick(keys_B, probs), probs)

    return jax.lax.cond(jnp.all(sampling.temperature == 0), lambda _: _greedy(logits_BxV), draw, None)
