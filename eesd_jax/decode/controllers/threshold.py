"""Drafts while the exit branch is sure of itself, as LayerSkip and Draft & Verify do."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from eesd_jax.decode.controllers.lazy import jax
from eesd_jax.decode.controllers.protocol import Controller, Setup, register


@register("threshold:t")
@dataclasses.dataclass(frozen=True)
class Threshold(Controller):
    """Stops when the branch's probability of its last draft falls below `minimum`; so there is always one draft."""

    minimum: float

    @classmethod
    def parse(cls, value: str | None, max_draft: int) -> float:
        """Takes t in [0, 1]."""
        if not re.fullmatch(r"\d*\.?\d+", value or ""):
            raise ValueError
        if float(value) > 1:
            raise ValueError("is out of range; expected a threshold from 0 to 1")
        return float(value)

    @classmethod
    def build(cls, value: float, setup: Setup) -> Threshold:
        """Makes it of its threshold."""
        return cls(value)

    def keep_drafting(self, keys_B: jax.Array, plan: Any, k: jax.Array, confidence_B: jax.Array) -> tuple[jax.Array, Any]:
        """Drafts on after a draft that is at least as probable as the threshold."""
        return confidence_B >= self.minimum, plan
