"""Cali-TS: Thompson sampling that asks the exit branch how sure it is (our reading of EESD)."""

from __future__ import annotations

import dataclasses

from eesd_jax.decode.controllers.beta import Beta, draw_beta
from eesd_jax.decode.controllers.lazy import jax, jnp
from eesd_jax.decode.controllers.protocol import Argument, Controller, Offer, Posterior, Setup, register


@dataclasses.dataclass(frozen=True)
class Calibration(Argument):
    """Turns the branch's confidence into a probability of acceptance: sigmoid(slope * logit(confidence) + intercept) (Platt 1999)."""

    slope: float = 1.0
    intercept: float = 0.0

    def log_odds(self, confidence: jax.Array) -> jax.Array:
        """Returns log odds of acceptance, finite; float32 of any shape to float32 of that shape."""
        eps = jnp.finfo(jnp.float32).eps
        clipped = jnp.clip(confidence, eps, 1 - eps)
        return self.slope * (jnp.log(clipped) - jnp.log1p(-clipped)) + self.intercept

    def __call__(self, confidence: jax.Array) -> jax.Array:
        """Returns the probability of acceptance, shapes as above."""
        return jax.nn.sigmoid(self.log_odds(confidence))


@register("calibrated")
@dataclasses.dataclass(frozen=True)
class Calibrated(Beta):
    """Enters the calibrated confidence s of the last draft into the posterior as kappa pseudo-counts.

    theta_k ~ Beta(alpha + kappa s, beta + kappa (1 - s)), drawn anew at every step; before the first draft there is no confidence, and
    theta is drawn as in `Beta`.

    Attributes:
      calibration: from the branch's confidence to a probability of acceptance, fitted on held-out data and stored with the branch.
      kappa: weight of the confidence, in pseudo-counts.
      capacity: alpha + beta are scaled down to this sum, so that kappa keeps its pull however long the text.
    """

    calibration: Calibration = dataclasses.field(kw_only=True)
    kappa: float = dataclasses.field(kw_only=True)
    capacity: float = dataclasses.field(kw_only=True)

    parse = Controller.parse

    @classmethod
    def build(cls, value: None, setup: Setup) -> Calibrated:
        """Makes it of the prior and the branch's calibration."""
        return cls(**setup.prior, calibration=setup.calibration, kappa=setup.settings.kappa, capacity=setup.settings.capacity)

    def propose(self, keys_B: jax.Array, state: Posterior, offer: Offer) -> Posterior:
        """Scales the counts down; theta is drawn at every step."""
        scale = jnp.minimum(1.0, self.capacity / (state.alpha + state.beta))
        return Posterior(alpha=state.alpha * scale, beta=state.beta * scale)

    def keep_drafting(self, keys_B: jax.Array, plan: Posterior, k: jax.Array, confidence_B: jax.Array) -> tuple[jax.Array, Posterior]:
        """Draws theta given the confidence, and drafts on with that probability."""
        theta_keys, coin_keys = jax.vmap(jax.random.split, out_axes=1)(keys_B)
        weight, s = jnp.where(k > 0, self.kappa, 0.0), self.calibration(confidence_B)
        theta = draw_beta(theta_keys, plan.alpha + weight * s, plan.beta + weight * (1 - s))
        return jax.vmap(jax.random.uniform)(coin_keys) < theta, plan
