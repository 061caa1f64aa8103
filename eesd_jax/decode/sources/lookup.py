"""Drafts from the text itself: what followed the last few tokens when they stood there before (prompt lookup; Saxena 2023).

No model is asked. Where text repeats itself (code, quotations, names, lists) such drafts are often right; elsewhere there is no match,
and no cost. The longer the text agrees with what stood before, the likelier it goes on as it did then.

Axes: B rows, S capacity in tokens, K drafts at most.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# How often a draft is right behind so many tokens in common (1, 2, ..., and more), if those before it are: about as often as in greedy
# answers of the built-in model to MT-bench and HumanEval. What a row's own drafts teach corrects it (`decode/sources/bandit.py`).
_CHANCE = (0.17, 0.40, 0.58, 0.68, 0.77, 0.80, 0.81, 0.83, 0.86, 0.86, 0.86, 0.88, 0.90, 0.92, 0.93, 0.94, 0.95, 0.95, 0.96, 0.97)


class Lookup(NamedTuple):
    """What was found.

    tokens: int32 [B, K], what followed the match. count: int32 [B], how many of them there are; 0 without a match. chance: float32 [B, K],
    of each draft to be right if those before it are, as far as is known before any was tried.
    """

    tokens: jax.Array
    count: jax.Array
    chance: jax.Array


def expected_drafts(chance: jax.Array) -> jax.Array:
    """How many of the first 1, 2, ... drafts are expected to be right, [..., K], where each has a chance if those before it are right."""
    return jnp.cumsum(jnp.cumprod(chance, axis=-1), axis=-1)


def look_up(tokens_BxS: jax.Array, length_B: jax.Array, longest: int, max_draft: int) -> Lookup:
    """Finds the last place where the text's last n tokens stood before, for the greatest n up to `longest` for which there is one.

    Args:
      tokens_BxS: int32, valid up to each row's length.
      length_B: int32 [B], at least 1.
      longest: the most tokens that a match is asked to have in common with the end.
      max_draft: K.
    """
    capacity = tokens_BxS.shape[1]
    place_S = jnp.arange(capacity)
    last_B = length_B - 1
    # How far the text before place s agrees with the text before the end, both included.
    agreed_BxS = jnp.zeros(tokens_BxS.shape, jnp.int32)
    agrees = (place_S < last_B[:, None]) & (length_B[:, None] > 0)
    for back in range(longest):
        end_B = jnp.take_along_axis(tokens_BxS, jnp.maximum(last_B - back, 0)[:, None], axis=1)
        shifted = jnp.roll(tokens_BxS, back, axis=1)
        agrees = agrees & (shifted == end_B) & (place_S >= back)
        agreed_BxS += agrees
    # The longest match counts, and of those the last.
    best_B = jnp.argmax(agreed_BxS * capacity + place_S, axis=1)
    matched = jnp.take_along_axis(agreed_BxS, best_B[:, None], axis=1)[:, 0]
    places_BxK = best_B[:, None] + 1 + jnp.arange(max_draft)
    drafts = jnp.take_along_axis(tokens_BxS, jnp.minimum(places_BxK, capacity - 1), axis=1)
    count = jnp.where(matched > 0, jnp.minimum(max_draft, length_B - 1 - best_B), 0)
    # All that the text has in common there, which may be more than was looked for.
    back = jnp.arange(len(_CHANCE))
    ends, there = (jnp.take_along_axis(tokens_BxS, jnp.maximum(place[:, None] - back, 0), axis=1) for place in (last_B, best_B))
    common_B = jnp.sum(jnp.cumprod((ends == there) & (back <= best_B[:, None]), axis=1), axis=1)
    chance_BxK = jnp.array(_CHANCE)[jnp.clip(common_B[:, None] - 1 + jnp.arange(max_draft), 0, len(_CHANCE) - 1)]
    return Lookup(drafts, count, chance_BxK)
