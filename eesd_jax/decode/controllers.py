"""Controllers: how many tokens to draft in a round, learnt from how many were accepted.

A controller is a frozen dataclass of settings with pure functions; all that it learns is in a state with leading axis B, carried by the
decoding loop:

    state = controller.init(batch)
    plan = controller.propose(keys_B, state, running_B)                            # once a round
    keep, plan = controller.keep_drafting(keys_B, plan, k, confidence_B)           # before draft k, k = 0, 1, ...
    state = controller.update(state, plan, drafted_B, accepted_B)                  # once a round; see `Controller.update`

Those here are pytrees, whose numbers are arguments of the compiled program: other numbers do not compile it again. One that is not is
compiled in.

Controllers may look at drafts that were sampled already, because every sampled draft is verified: none of them can change the output's law.
The paper's prior, its Cali-TS formula and its hyper-parameters are not known to us; the defaults in `config.py` are our own.

Axes: B rows (keys and decisions are one a row), K drafts at most, L = K + 1 lengths of a round.
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

        It is asked after every draft, the last one included. confidence_B: float32 [B], the branch's probability of the draft sampled last;
        1 at k = 0.
        """

    def update(self, state: Any, plan: Any, drafted_B: jax.Array, accepted_B: jax.Array, replaced_B: jax.Array | None = None) -> Any:
        """Learns from a round: the plan as it was in the end, and int32 [B] tokens drafted, and of those accepted.

        Where a place has several candidates (`DraftConfig.candidates`) a fifth argument says in which rows another one stood in for the
        rejected draft, bool [B]. It is not given otherwise.
        """

    def mean(self, state: Any) -> jax.Array:
        """The expected acceptance of one draft, float32 [B]; NaN where the controller has no such belief."""


def as_argument(controller: Controller | None) -> Controller | None:
    """The same controller, which a compiled program can be given from now on; None stays None."""
    if jax.tree_util.all_leaves([controller]):  # somebody's own, which is not registered
        jax.tree_util.register_static(type(controller))
    return controller


class NoState(NamedTuple):
    """For controllers that learn nothing. rows: float32 [B], NaN."""

    rows: jax.Array


class BetaState(NamedTuple):
    """Posterior of the acceptance of a draft, float32 [B] each: pseudo-counts of accepted and of rejected drafts."""

    alpha: jax.Array
    beta: jax.Array


# Every text begins as if so many rejections had been seen, and for this share of them the next candidate had been right: it was for 0.15,
# with a branch of which a quarter of the drafts is accepted, and is for more with a better one.
REPLACED_MEAN, REPLACED_WEIGHT = 0.2, 4.0


class Replacements(NamedTuple):
    """How often another candidate stood in for a rejected draft: discounted counts of rejections and of those, float32 [B] each."""

    rejected: jax.Array
    replaced: jax.Array

    @classmethod
    def none(cls, batch: int, candidates: int) -> "Replacements | None":
        """Before the first round; None where a place has one candidate."""
        return None if candidates == 1 else cls(jnp.zeros(batch, jnp.float32), jnp.zeros(batch, jnp.float32))

    def chance(self, candidates: int) -> jax.Array:
        """Of one of the others to stand in for a rejected draft, float32 [B]."""
        expected = REPLACED_WEIGHT * (1 - (1 - REPLACED_MEAN) ** (candidates - 1))
        return (self.replaced + expected) / (self.rejected + REPLACED_WEIGHT)

    def learn(self, discount_B: jax.Array, failed_B: jax.Array, replaced_B: jax.Array) -> "Replacements":
        """Behind a round with `failed_B` (0 or 1) rejections."""
        return Replacements(discount_B * self.rejected + failed_B, discount_B * self.replaced + replaced_B)


_PROPOSALS = 8  # of which 95% or more are accepted; 3 draws in 10 ** 11 see none


def draw_beta(keys_B: jax.Array, alpha_B: jax.Array, beta_B: jax.Array) -> jax.Array:
    """A draw from Beta(alpha, beta), alpha and beta > 0, for each row: float32 [B].

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


class _Stateless:
    def init(self, batch: int) -> NoState:
        return NoState(jnp.full(batch, jnp.nan, jnp.float32))

    def propose(self, keys_B: jax.Array, state: NoState, running_B: jax.Array) -> NoState:
        return state

    def update(
        self, state: NoState, plan: NoState, drafted_B: jax.Array, accepted_B: jax.Array, replaced_B: jax.Array | None = None
    ) -> NoState:
        return state

    def mean(self, state: NoState) -> jax.Array:
        return state.rows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fixed(_Stateless):
    """Always `length` drafts."""

    length: int

    def keep_drafting(self, keys_B: jax.Array, plan: NoState, k: jax.Array, confidence_B: jax.Array) -> tuple[jax.Array, NoState]:
        return jnp.broadcast_to(k < self.length, confidence_B.shape), plan


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Threshold(_Stateless):
    """Stops when the branch's probability of its last draft falls below `minimum` (as LayerSkip and Draft & Verify do)."""

    minimum: float

    def keep_drafting(self, keys_B: jax.Array, plan: NoState, k: jax.Array, confidence_B: jax.Array) -> tuple[jax.Array, NoState]:
        return confidence_B >= self.minimum, plan


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Beta:
    """Beta-TS (EESD, section 3.3): draws theta from the posterior each round, and drafts on with probability theta each step.

    Attributes:
      prior_alpha, prior_beta: pseudo-counts before the first round.
      discount: what remains of the evidence (not of the prior) after a round with drafts; 1 forgets nothing.
      idle_discount: the same after a round without drafts. It teaches nothing, but without forgetting, a belief that drafts do not pay
        would never be put to the test again.
      censored: what lies behind the first rejection was never tested, so a round adds one failure at most. Otherwise every draft that was
        not accepted counts, as the paper reads.
    """

    prior_alpha: float
    prior_beta: float
    discount: float
    idle_discount: float
    censored: bool = dataclasses.field(default=True, metadata={"static": True})

    def init(self, batch: int) -> BetaState:
        return BetaState(jnp.full(batch, self.prior_alpha, jnp.float32), jnp.full(batch, self.prior_beta, jnp.float32))

    def propose(self, keys_B: jax.Array, state: BetaState, running_B: jax.Array) -> jax.Array:
        return draw_beta(keys_B, state.alpha, state.beta)

    def keep_drafting(self, keys_B: jax.Array, plan: jax.Array, k: jax.Array, confidence_B: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.vmap(jax.random.uniform)(keys_B) < plan, plan

    def failures(self, drafted_B: jax.Array, accepted_B: jax.Array) -> jax.Array:
        """Drafts that count as failed, int32 [B]."""
        rejected = drafted_B - accepted_B
        return jnp.minimum(rejected, 1) if self.censored else rejected

    def remembered(self, count_B: jax.Array, prior: float, drafted_B: jax.Array) -> jax.Array:
        """What a round leaves of a pseudo-count that began as `prior`, float32 [B]."""
        return prior + jnp.where(drafted_B > 0, self.discount, self.idle_discount) * (count_B - prior)

    def update(
        self, state: BetaState, plan: Any, drafted_B: jax.Array, accepted_B: jax.Array, replaced_B: jax.Array | None = None
    ) -> BetaState:
        return BetaState(
            self.remembered(state.alpha, self.prior_alpha, drafted_B) + accepted_B,
            self.remembered(state.beta, self.prior_beta, drafted_B) + self.failures(drafted_B, accepted_B),
        )

    def mean(self, state: BetaState) -> jax.Array:
        return state.alpha / (state.alpha + state.beta)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Calibration:
    """Turns the branch's confidence into a probability of acceptance: sigmoid(slope * logit(confidence) + intercept) (Platt 1999)."""

    slope: float = 1.0
    intercept: float = 0.0

    def log_odds(self, confidence: jax.Array) -> jax.Array:
        """Log odds of acceptance, finite; float32 of any shape to float32 of that shape."""
        eps = jnp.finfo(jnp.float32).eps
        clipped = jnp.clip(confidence, eps, 1 - eps)
        return self.slope * (jnp.log(clipped) - jnp.log1p(-clipped)) + self.intercept

    def __call__(self, confidence: jax.Array) -> jax.Array:
        """Probability of acceptance, shapes as above."""
        return jax.nn.sigmoid(self.log_odds(confidence))


@jax.tree_util.register_dataclass
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

    def keep_drafting(self, keys_B: jax.Array, plan: BetaState, k: jax.Array, confidence_B: jax.Array) -> tuple[jax.Array, BetaState]:
        theta_keys, coin_keys = jax.vmap(jax.random.split, out_axes=1)(keys_B)
        weight, s = jnp.where(k > 0, self.kappa, 0.0), self.calibration(confidence_B)
        theta = draw_beta(theta_keys, plan.alpha + weight * s, plan.beta + weight * (1 - s))
        return jax.vmap(jax.random.uniform)(coin_keys) < theta, plan


class CostState(NamedTuple):
    """What `CostAware` has learnt, float32 [B] each.

    alpha, beta: as in `BetaState`. predicted: how many of the same alpha + beta drafts the calibrated confidence expected to be accepted;
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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CostAware(Beta):
    """Drafts the length that gives the most expected tokens per unit of measured time (ours).

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

    calibration: Calibration = dataclasses.field(kw_only=True)
    cost: tuple[float, ...] = dataclasses.field(kw_only=True)
    candidates: int = dataclasses.field(default=1, kw_only=True, metadata={"static": True})

    def init(self, batch: int) -> CostState:
        predicted = jnp.full(batch, self.prior_alpha, jnp.float32)
        return CostState(*Beta.init(self, batch), predicted, Replacements.none(batch, self.candidates))

    def propose(self, keys_B: jax.Array, state: CostState, running_B: jax.Array) -> CostPlan:
        found = jnp.log(state.alpha) - jnp.log(state.beta)
        predicted = jnp.log(state.predicted) - jnp.log(state.alpha + state.beta - state.predicted)
        one = jnp.ones_like(state.alpha)
        nothing_BxK = jnp.zeros((one.size, len(self.cost) - 1), jnp.float32)
        theta = Beta.propose(self, keys_B, state, running_B)
        replaced = 0 * one if state.replacements is None else state.replacements.chance(self.candidates)
        return CostPlan(theta, found - predicted, nothing_BxK, survival=one, expected=one, replaced=replaced, running=running_B)

    def keep_drafting(self, keys_B: jax.Array, plan: CostPlan, k: jax.Array, confidence_B: jax.Array) -> tuple[jax.Array, CostPlan]:
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

    def update(
        self, state: CostState, plan: CostPlan, drafted_B: jax.Array, accepted_B: jax.Array, replaced_B: jax.Array | None = None
    ) -> CostState:
        learned = Beta.update(self, BetaState(state.alpha, state.beta), plan, drafted_B, accepted_B)
        tested = accepted_B + self.failures(drafted_B, accepted_B)
        said_BxK = jnp.where(jnp.arange(plan.confidence.shape[1]) < tested[:, None], plan.confidence, 0.0)
        predicted = self.remembered(state.predicted, self.prior_alpha, drafted_B) + jnp.sum(said_BxK, axis=1)
        replacements = state.replacements
        if replacements is not None:
            fade = jnp.where(drafted_B > 0, self.discount, self.idle_discount)
            replacements = replacements.learn(fade, jnp.minimum(drafted_B - accepted_B, 1), replaced_B)
        return CostState(*learned, predicted, replacements)
