"""Controllers: how many tokens to draft in a round, learnt from how many were accepted.

A controller is a frozen dataclass of static settings with pure functions; all that it learns is in a state with leading axis B, carried by
the decoding loop:

    state = controller.init(batch)
    plan = controller.propose(keys_B, state, running_B)                            # once a round
    keep, plan = controller.keep_drafting(keys_B, plan, k, confidence_B)           # before draft k, k = 0, 1, ...
    state = controller.update(state, drafted_B, accepted_B)                        # once a round

Controllers may look at drafts that were sampled already, because every sampled draft is verified: none of them can change the output's law.
The paper's prior, its Cali-TS formula and its hyper-parameters are not known to us; the defaults in `config.py` are our own.

Axes: B rows; keys and decisions are one a row.
"""

import dataclasses
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp


class Controller(Protocol):
    """What the decoding loop asks of a controller."""

    def init(self, batch: int) -> Any:
        """State before the first round."""

    def propose(self, keys_B: jax.Array, state: Any, running_B: jax.Array) -> Any:
        """Draws what the round's decisions follow. running_B: bool [B], rows that are not finished."""

    def keep_drafting(self, keys_B: jax.Array, plan: Any, k: jax.Array, confidence_B: jax.Array) -> tuple[jax.Array, Any]:
        """Whether to draft one more, with k drafted so far: bool [B], and the plan for the next question.

        confidence_B: float32 [B], the branch's probability of the draft sampled last; 1 at k = 0.
        """

    def update(self, state: Any, drafted_B: jax.Array, accepted_B: jax.Array) -> Any:
        """Learns from a round: int32 [B] tokens drafted, and of those accepted."""

    def mean(self, state: Any) -> jax.Array:
        """The expected acceptance of one draft, float32 [B]; NaN where the controller has no such belief."""


class NoState(NamedTuple):
    """For controllers that learn nothing. rows: float32 [B], NaN."""

    rows: jax.Array


class BetaState(NamedTuple):
    """Posterior of the acceptance of a draft, float32 [B] each: pseudo-counts of accepted and of rejected drafts."""

    alpha: jax.Array
    beta: jax.Array


class _Stateless:
    def init(self, batch: int) -> NoState:
        return NoState(jnp.full(batch, jnp.nan, jnp.float32))

    def propose(self, keys_B: jax.Array, state: NoState, running_B: jax.Array) -> NoState:
        return state

    def update(self, state: NoState, drafted_B: jax.Array, accepted_B: jax.Array) -> NoState:
        return state

    def mean(self, state: NoState) -> jax.Array:
        return state.rows


@dataclasses.dataclass(frozen=True)
class Fixed(_Stateless):
    """Always `length` drafts."""

    length: int

    def keep_drafting(self, keys_B: jax.Array, plan: NoState, k: jax.Array, confidence_B: jax.Array) -> tuple[jax.Array, NoState]:
        return jnp.broadcast_to(k < self.length, confidence_B.shape), plan


@dataclasses.dataclass(frozen=True)
class Forced(_Stateless):
    """As many drafts as the state says, int32 [B], so that one program serves every length: for measuring what a round costs."""

    def init(self, batch: int) -> jax.Array:
        return jnp.zeros(batch, jnp.int32)

    def keep_drafting(self, keys_B: jax.Array, plan: jax.Array, k: jax.Array, confidence_B: jax.Array) -> tuple[jax.Array, jax.Array]:
        return k < plan, plan

    def mean(self, state: jax.Array) -> jax.Array:
        return jnp.full(state.shape, jnp.nan, jnp.float32)


@dataclasses.dataclass(frozen=True)
class Threshold(_Stateless):
    """Stops when the branch's probability of its last draft falls below `minimum` (as LayerSkip and Draft & Verify do)."""

    minimum: float

    def keep_drafting(self, keys_B: jax.Array, plan: NoState, k: jax.Array, confidence_B: jax.Array) -> tuple[jax.Array, NoState]:
        return confidence_B >= self.minimum, plan


@dataclasses.dataclass(frozen=True)
class Beta:
    """Beta-TS (EESD, section 3.3): draws theta from the posterior each round, and drafts on with probability theta each step.

    Attributes:
      prior_alpha, prior_beta: pseudo-counts before the first round.
      discount: what remains of the evidence (not of the prior) after each round; 1 forgets nothing.
      censored: what lies behind the first rejection was never tested, so a round adds one failure at most. Otherwise every draft that was
        not accepted counts, as the paper reads.
    """

    prior_alpha: float
    prior_beta: float
    discount: float
    censored: bool = True

    def init(self, batch: int) -> BetaState:
        return BetaState(jnp.full(batch, self.prior_alpha, jnp.float32), jnp.full(batch, self.prior_beta, jnp.float32))

    def propose(self, keys_B: jax.Array, state: BetaState, running_B: jax.Array) -> jax.Array:
        return jax.vmap(jax.random.beta)(keys_B, state.alpha, state.beta)

    def keep_drafting(self, keys_B: jax.Array, plan: jax.Array, k: jax.Array, confidence_B: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.vmap(jax.random.uniform)(keys_B) < plan, plan

    def update(self, state: BetaState, drafted_B: jax.Array, accepted_B: jax.Array) -> BetaState:
        rejected = drafted_B - accepted_B
        failures = jnp.minimum(rejected, 1) if self.censored else rejected
        # A round that drafted nothing taught nothing, and forgets nothing.
        discount = jnp.where(drafted_B > 0, self.discount, 1.0)
        return BetaState(
            self.prior_alpha + discount * (state.alpha - self.prior_alpha) + accepted_B,
            self.prior_beta + discount * (state.beta - self.prior_beta) + failures,
        )

    def mean(self, state: BetaState) -> jax.Array:
        return state.alpha / (state.alpha + state.beta)


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Turns the branch's confidence into a probability of acceptance: sigmoid(slope * logit(confidence) + intercept) (Platt 1999)."""

    slope: float = 1.0
    intercept: float = 0.0

    def __call__(self, confidence: jax.Array) -> jax.Array:
        """float32 of any shape to float32 of that shape."""
        clipped = jnp.clip(confidence, 1e-6, 1 - 1e-6)  # a finite logit
        return jax.nn.sigmoid(self.slope * (jnp.log(clipped) - jnp.log1p(-clipped)) + self.intercept)


@dataclasses.dataclass(frozen=True)
class Calibrated(Beta):
    """Cali-TS, our reading: the calibrated confidence s of the last draft enters the posterior as kappa pseudo-counts.

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

    def propose(self, keys_B: jax.Array, state: BetaState, running_B: jax.Array) -> BetaState:
        scale = jnp.minimum(1.0, self.capacity / (state.alpha + state.beta))
        return BetaState(state.alpha * scale, state.beta * scale)

    def theta(self, keys_B: jax.Array, posterior: BetaState, k: jax.Array, confidence_B: jax.Array) -> jax.Array:
        """A draw of the acceptance of the draft sampled last (of the next one at k = 0), float32 [B]."""
        weight, s = jnp.where(k > 0, self.kappa, 0.0), self.calibration(confidence_B)
        return jax.vmap(jax.random.beta)(keys_B, posterior.alpha + weight * s, posterior.beta + weight * (1 - s))

    def keep_drafting(self, keys_B: jax.Array, plan: BetaState, k: jax.Array, confidence_B: jax.Array) -> tuple[jax.Array, BetaState]:
        theta_keys, coin_keys = jax.vmap(jax.random.split, out_axes=1)(keys_B)
        return jax.vmap(jax.random.uniform)(coin_keys) < self.theta(theta_keys, plan, k, confidence_B), plan


class CostPlan(NamedTuple):
    """What `CostAware` knows of the round so far, per row.

    posterior: capped. theta: float32 [B], drawn acceptance of the drafts to come. survival: float32 [B], probability that all drafts so far
    are accepted. expected: float32 [B], tokens that the round gives if it stops here. running: bool [B].
    """

    posterior: BetaState
    theta: jax.Array
    survival: jax.Array
    expected: jax.Array
    running: jax.Array


@dataclasses.dataclass(frozen=True)
class CostAware(Calibrated):
    """Drafts the length that gives the most expected tokens per unit of measured time (ours).

    theta is drawn as in `Beta` for drafts to come and as in `Calibrated` for those sampled, and the length maximises
    E[tokens(length)] / cost[length]. A batch pays for its longest row, so one length is chosen for all running rows together.

    Attributes:
      cost: seconds of a round with 0, 1, ... max_draft drafts; only their ratios matter.
    """

    cost: tuple[float, ...] = dataclasses.field(kw_only=True)

    def propose(self, keys_B: jax.Array, state: BetaState, running_B: jax.Array) -> CostPlan:
        posterior = Calibrated.propose(self, keys_B, state, running_B)
        one = jnp.ones_like(state.alpha)
        theta = jax.vmap(jax.random.beta)(keys_B, posterior.alpha, posterior.beta)
        return CostPlan(posterior, theta, survival=one, expected=one, running=running_B)

    def keep_drafting(self, keys_B: jax.Array, plan: CostPlan, k: jax.Array, confidence_B: jax.Array) -> tuple[jax.Array, CostPlan]:
        survival = jnp.where(k > 0, plan.survival * self.theta(keys_B, plan.posterior, k, confidence_B), plan.survival)
        expected = plan.expected + jnp.where(k > 0, survival, 0.0)
        plan = plan._replace(survival=survival, expected=expected)
        # Expected tokens of every length still possible: drafts to come are each accepted with probability theta if all before them were.
        lengths = jnp.arange(len(self.cost))
        powers_BxK = jnp.where(lengths > k, plan.theta[:, None] ** jnp.maximum(lengths - k, 1), 0.0)
        tokens_BxK = expected[:, None] + survival[:, None] * jnp.cumsum(powers_BxK, axis=1)
        rate_K = jnp.sum(tokens_BxK * plan.running[:, None], axis=0) / jnp.array(self.cost, jnp.float32)
        best = jnp.argmax(jnp.where(lengths >= k, rate_K, -jnp.inf))
        return jnp.broadcast_to(best > k, confidence_B.shape), plan
