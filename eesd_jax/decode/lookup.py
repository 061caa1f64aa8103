"""Drafts from the text itself: what followed the last few tokens when they stood there before (prompt lookup; Saxena 2023).

No model is asked. Where text repeats itself (code, quotations, names, lists) such drafts are often right; elsewhere there is no match,
and no cost.

Axes: B rows, S capacity in tokens, K drafts at most.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Lookup(NamedTuple):
    """What was found.

    tokens: int32 [B, K], what followed the match. count: int32 [B], how many of them there are; 0 without a match. matched: int32 [B],
    tokens that the match has in common with the end of the text, from 0 (no match) to the longest that was looked for.
    """

    tokens: jax.Array
    count: jax.Array
    matched: jax.Array


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
    return Lookup(drafts, count, matched)
