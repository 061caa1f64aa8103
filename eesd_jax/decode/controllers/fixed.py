"""Drafts a fixed number of tokens."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from eesd_jax.decode.controllers.lazy import jax, jnp
from eesd_jax.decode.controllers.protocol import Controller, Setup, register


@register("fixed:K")
@dataclasses.dataclass(frozen=True)
class Fixed(Controller):
    """Always `length` drafts."""

    needs_branch = False

    length: int

    @classmethod
    def parse(cls, value: str | None, max_draft: int) -> int:
        """Takes K in 0..max_draft."""
        if not re.fullmatch(r"\d+", value or ""):
            raise ValueError
        if int(value) > max_draft:
            raise ValueError(f"drafts more than max_draft, which is {max_draft}")
        return int(value)

    @classmethod
    def build(cls, value: int, setup: Setup) -> Fixed:
        """Makes it of its length."""
        return cls(value)

    def keep_drafting(self, keys_B: jax.Array, plan: Any, k: jax.Array, confidence_B: jax.Array) -> tuple[jax.Array, Any]:
        """Drafts on up to the length."""
        return jnp.broadcast_to(k < self.length, confidence_B.shape), plan
