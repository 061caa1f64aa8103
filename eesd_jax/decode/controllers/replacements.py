"""Counts how often another candidate stands in for a rejected draft, where a place has several (`DraftConfig.candidates`)."""

from __future__ import annotations

from typing import NamedTuple

from eesd_jax.decode.controllers.lazy import jax, jnp

# Every text begins as if so many rejections had been seen, and for this share of them the next candidate had been right: it was for 0.15,
# with a branch of which a quarter of the drafts is accepted, and is for more with a better one.
REPLACED_MEAN, REPLACED_WEIGHT = 0.2, 4.0


class Replacements(NamedTuple):
    """Discounted counts of rejections, and of those for which another candidate stood in, float32 [B] each."""

    rejected: jax.Array
    replaced: jax.Array

    @classmethod
    def none(cls, batch: int, candidates: int) -> Replacements | None:
        """Counts before the first round; None where a place has one candidate."""
        return None if candidates == 1 else cls(rejected=jnp.zeros(batch, jnp.float32), replaced=jnp.zeros(batch, jnp.float32))

    def chance(self, candidates: int) -> jax.Array:
        """Expects one of the others to stand in for a rejected draft with this probability, float32 [B]."""
        expected = REPLACED_WEIGHT * (1 - (1 - REPLACED_MEAN) ** (candidates - 1))
        return (self.replaced + expected) / (self.rejected + REPLACED_WEIGHT)

    def learn(self, discount_B: jax.Array, failed_B: jax.Array, replaced_B: jax.Array) -> Replacements:
        """Adds a round with `failed_B` (0 or 1) rejections."""
        return Replacements(rejected=discount_B * self.rejected + failed_B, replaced=discount_B * self.replaced + replaced_B)
