"""Drafts for the most tokens per unit of measured time (ours)."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from eesd_jax.decode.controllers.beta import Beta
from eesd_jax.decode.controllers.calibrated import Calibration
from eesd_jax.decode.controllers.lazy import jax, jnp
from eesd_jax.decode.controllers.protocol import Controller, Offer, Outcome, Posterior, Setup, register
from eesd_jax.decode.controllers.replacements import Replacements


class CostState(NamedTuple):
    """What `CostAware` has learnt, float32 [B] each.

    alpha, beta: as in `Posterior`. predicted: how many of the same alpha + beta drafts the calibrated confidence expected to be accepted;
    of the prior's, prior_alpha. replacements: of rejected drafts; None where a place has one candidate.
    """

    alpha: jax.Array
    beta: jax.Array
    predicted: jax.Array
    replacements: Replacements | None = None


class CostPlan(NamedTuple):
    """What `CostAware` knows of the round so far, per row.

    theta: float32 [B], drawn acceptance of the drafts to come. correction: float32 [B], added to the log odds that the confidence gives.
    confidence: float32 [B, K], calibrated, of the drafts so far. survival: float32 [B], probability that all drafts so far are accepted.
    expected: float32 [B], tokens that the round gives if it stops here, without other candidates. replaced: float32 [B], probability that
    one of these stands in for a rejected draft. running: bool [B].
    """

    theta: jax.Array
    correction: jax.Array
    confidence: jax.Array
    survival: jax.Array
    expected: jax.Array
    replaced: jax.Array
    running: jax.Array


@register("cost_aware")
@dataclasses.dataclass(frozen=True)
class CostAware(Beta):
    """Drafts the length that gives the most expected tokens per unit of measured time.

    Before each draft it finds the length that maximises E[tokens(length)] / cost[length], and drafts on if that is more than it has. A
    batch pays for its longest row and is done with its slowest one, so one length is chosen for all running rows: that of the least time
    per token, averaged over them. For drafts to come the acceptance is theta, drawn once a round as in `Beta`: the draw is what explores.
    For drafts sampled already it is what their confidence says, corrected by what the row's text has shown: the log odds are shifted by
    the difference between the acceptance found and the acceptance that the confidence had predicted for the same drafts. So the confidence
    is trusted to tell drafts from each other, and the counts to know their level.

    Where a place has several candidates, a round that does not keep all its drafts gives one token more, as often as one of the others has
    stood in for a rejected draft of this row.

    Attributes:
      calibration: from the branch's confidence to a probability of acceptance.
      cost: seconds of a round with 0, 1, ... K drafts; only their ratios matter.
      candidates: see `DraftConfig`.
    """

    needs_costs = True
    needs_branch = False

    calibration: Calibration = dataclasses.field(kw_only=True)
    cost: tuple[float, ...] = dataclasses.field(kw_only=True)
    candidates: int = dataclasses.field(default=1, kw_only=True, metadata={"static": True})

    parse = Controller.parse

    @classmethod
    def build(cls, value: None, setup: Setup) -> CostAware:
        """Makes it of the prior, the branch's calibration and what its rounds cost."""
        return cls(**setup.prior, calibration=setup.calibration, cost=setup.costs.exit, candidates=setup.candidates)

    def init(self, batch: int) -> CostState:
        """Believes the prior, and the confidence."""
        prior = Beta.init(self, batch)
        return CostState(
            alpha=prior.alpha,
            beta=prior.beta,
            predicted=jnp.full(batch, self.prior_alpha, jnp.float32),
            replacements=Replacements.none(batch, self.candidates),
        )

    def propose(self, keys_B: jax.Array, state: CostState, offer: Offer) -> CostPlan:
        """Draws theta, and finds how far the confidence is off."""
        found = jnp.log(state.alpha) - jnp.log(state.beta)
        predicted = jnp.log(state.predicted) - jnp.log(state.alpha + state.beta - state.predicted)
        one = jnp.ones_like(state.alpha)
        nothing_BxK = jnp.zeros((one.size, len(self.cost) - 1), jnp.float32)
        return CostPlan(
            theta=Beta.propose(self, keys_B, state, offer),
            correction=found - predicted,
            confidence=nothing_BxK,
            survival=one,
            expected=one,
            replaced=0 * one if state.replacements is None else state.replacements.chance(self.candidates),
            running=offer.running,
        )

    def keep_drafting(self, keys_B: jax.Array, plan: CostPlan, k: jax.Array, confidence_B: jax.Array) -> tuple[jax.Array, CostPlan]:
        """Drafts on where some greater length gives tokens in less time."""
        log_odds = self.calibration.log_odds(confidence_B)
        is_last_K = jnp.arange(len(self.cost) - 1) == k - 1  # nowhere at k = 0
        confidence_BxK = jnp.where(is_last_K, jax.nn.sigmoid(log_odds)[:, None], plan.confidence)
        survival = plan.survival * jnp.where(k > 0, jax.nn.sigmoid(log_odds + plan.correction), 1.0)
        expected = plan.expected + jnp.where(k > 0, survival, 0.0)
        # Of every length still possible: the draft at distance d from here counts if those before it were accepted too, theta ** d.
        ahead_L = jnp.arange(len(self.cost)) - k
        powers_BxL = jnp.where(ahead_L > 0, plan.theta[:, None] ** jnp.maximum(ahead_L, 1), 0.0)
        tokens_BxL = expected[:, None] + survival[:, None] * jnp.cumsum(powers_BxL, axis=1)
        all_kept_BxL = survival[:, None] * jnp.where(ahead_L > 0, powers_BxL, 1.0)
        tokens_BxL += plan.replaced[:, None] * (1 - all_kept_BxL)
        time_L = jnp.array(self.cost, jnp.float32) * jnp.sum(plan.running[:, None] / tokens_BxL, axis=0)
        best = jnp.argmin(jnp.where(ahead_L >= 0, time_L, jnp.inf))
        plan = plan._replace(confidence=confidence_BxK, survival=survival, expected=expected)
        return jnp.broadcast_to(best > k, confidence_B.shape), plan

    def update(self, state: CostState, plan: CostPlan, outcome: Outcome) -> CostState:
        """Counts as `Beta` does, and what the confidence predicted of the same drafts."""
        counts = Beta.update(self, Posterior(alpha=state.alpha, beta=state.beta), plan, outcome)
        tested = outcome.accepted + self.failures(outcome)
        said_BxK = jnp.where(jnp.arange(plan.confidence.shape[1]) < tested[:, None], plan.confidence, 0.0)
        predicted = self.remembered(state.predicted, self.prior_alpha, outcome.drafted) + jnp.sum(said_BxK, axis=1)
        replacements = state.replacements
        if replacements is not None:
            failed = jnp.minimum(outcome.drafted - outcome.accepted, 1)
            replacements = replacements.learn(self.fade(outcome.drafted), failed, outcome.replaced)
        return CostState(alpha=counts.alpha, beta=counts.beta, predicted=predicted, replacements=replacements)
