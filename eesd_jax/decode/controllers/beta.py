"""Beta-TS (EESD, section 3.3): Thompson sampling of the acceptance of a draft."""

from __future__ import annotations

import dataclasses
from typing import Any

from eesd_jax.decode.controllers.lazy import jax, jnp
from eesd_jax.decode.controllers.protocol import Controller, Offer, Outcome, Posterior, Setup, register

_PROPOSALS = 8  # of which 95% or more are accepted; 3 draws in 10 ** 11 see none


def draw_beta(keys_B: jax.Array, alpha_B: jax.Array, beta_B: jax.Array) -> jax.Array:
    """Draws from Beta(alpha, beta), alpha and beta > 0, for each row: float32 [B].

    Each of the two gamma variables that it takes is the first accepted one of a fixed number of proposals (Marsaglia & Tsang 2000), all of
    which are drawn at once. `jax.random.beta` loops until one is accepted, on a CPU one row after the other.
    """
    shape_BxG = jnp.stack([alpha_B, beta_B], axis=1)
    tiny = jnp.finfo(jnp.float32).tiny
    uniform = jax.vmap(lambda key: jax.random.uniform(key, (2, 2 * _PROPOSALS + 1), minval=tiny))(keys_B)
    normal, log_u = jax.scipy.special.ndtri(uniform[..., :_PROPOSALS]), jnp.log(uniform[..., _PROPOSALS:])
    # For shapes of 1 and more, so of shape + 1; the power of a uniform variable leads back.
    d = (shape_BxG + 2 / 3)[..., None]
    cube_root = 1 + normal / jnp.sqrt(9 * d)
    log_v = 3 * jnp.log(jnp.maximum(cube_root, tiny))
    is_accepted = (cube_root > 0) & (log_u[..., 1:] < normal**2 / 2 + d * (1 - jnp.exp(log_v) + log_v))
    first = jnp.argmax(is_accepted, axis=-1, keepdims=True)
    log_gamma = jnp.log(d) + jnp.take_along_axis(log_v, first, axis=-1) + log_u[..., :1] / shape_BxG[..., None]
    return jax.nn.sigmoid(log_gamma[:, 0, 0] - log_gamma[:, 1, 0])


@register("beta", "beta:plain")
@dataclasses.dataclass(frozen=True)
class Beta(Controller):
    """Draws theta from the posterior each round, and drafts on with probability theta each step.

    Attributes:
      prior_alpha, prior_beta: pseudo-counts before the first round.
      discount: what remains of the evidence (not of the prior) after a round with drafts; 1 forgets nothing.
      idle_discount: the same after a round without drafts. It teaches nothing, but without forgetting, a belief that drafts do not pay
        would never be put to the test again.
      censored: what lies after the first rejection was never tested, so a round adds one failure at most. Otherwise every draft that was
        not accepted counts, as the paper reads.
    """

    prior_alpha: float
    prior_beta: float
    discount: float
    idle_discount: float
    censored: bool = True

    @classmethod
    def parse(cls, value: str | None, max_draft: int) -> str | None:
        """Takes `plain`, or nothing."""
        if value not in (None, "plain"):
            raise ValueError
        return value

    @classmethod
    def build(cls, value: str | None, setup: Setup) -> Beta:
        """Makes it of the prior, uncensored where it is `plain`."""
        return cls(**setup.prior, censored=value is None)

    def init(self, batch: int) -> Posterior:
        """Believes the prior."""
        return Posterior(alpha=jnp.full(batch, self.prior_alpha, jnp.float32), beta=jnp.full(batch, self.prior_beta, jnp.float32))

    def propose(self, keys_B: jax.Array, state: Posterior, offer: Offer) -> jax.Array:
        """Draws theta, float32 [B]."""
        return draw_beta(keys_B, state.alpha, state.beta)

    def keep_drafting(self, keys_B: jax.Array, plan: jax.Array, k: jax.Array, confidence_B: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Drafts on with probability theta."""
        return jax.vmap(jax.random.uniform)(keys_B) < plan, plan

    def failures(self, outcome: Outcome) -> jax.Array:
        """Counts drafts that failed, int32 [B]."""
        rejected = outcome.drafted - outcome.accepted
        return jnp.minimum(rejected, 1) if self.censored else rejected

    def fade(self, drafted_B: jax.Array) -> jax.Array:
        """Returns what remains of the evidence after a round, float32 [B]."""
        return jnp.where(drafted_B > 0, self.discount, self.idle_discount)

    def remembered(self, count_B: jax.Array, prior: float, drafted_B: jax.Array) -> jax.Array:
        """Returns what a round leaves of a pseudo-count that began as `prior`, float32 [B]."""
        return prior + self.fade(drafted_B) * (count_B - prior)

    def update(self, state: Posterior, plan: Any, outcome: Outcome) -> Posterior:
        """Adds accepted drafts to alpha, and failures to beta."""
        return Posterior(
            alpha=self.remembered(state.alpha, self.prior_alpha, outcome.drafted) + outcome.accepted,
            beta=self.remembered(state.beta, self.prior_beta, outcome.drafted) + self.failures(outcome),
        )

    def posterior(self, state: Posterior) -> Posterior:
        """Believes its counts."""
        return Posterior(alpha=state.alpha, beta=state.beta)
