"""Which source drafts in a round: the exit branch, lookup in the text, or nothing; a Thompson bandit with a posterior for each (ours).

Each row holds a Beta posterior of a draft's acceptance for the exit branch, and one for looked-up drafts by the length of their match, in
the text or in the table of n-grams, which says much about them. Those by length begin around what the row has seen of all lengths together,
so that a text that never repeats itself soon costs nothing. A round draws from all of them, and takes, of all pairs of lengths (one for the
rows that the branch drafts for, one for those with looked-up drafts), the pair with the least measured time per expected token. Where the
branch is chosen, its own controller says when to stop.

Axes: B rows, M + 1 kinds of a match (0: none), L = K + 1 lengths of a draft.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from eesd_jax.decode.controllers import Controller
from eesd_jax.decode.lookup import Lookup

# Chosen by replaying lookup on greedy texts of the built-in model: about as fast as priors that try more, and a text in which no looked-up
# draft is ever right loses less than 1%.
POOL_PRIOR = (0.4, 1.0)  # alpha and beta of all lengths together
POOL_WEIGHT = 6.0  # drafts that the pool's mean counts as in the prior of each length
LOOK_DISCOUNT = 0.985


class ArmsState(NamedTuple):
    """exit_alpha, exit_beta: float32 [B]. inner: of the branch's controller, or None.

    look_accepted, look_refused: float32 [B, M + 1], discounted counts of looked-up drafts by the length of their match; of all in place 0.
    """

    exit_alpha: jax.Array
    exit_beta: jax.Array
    look_accepted: jax.Array
    look_refused: jax.Array
    inner: Any


class ArmsPlan(NamedTuple):
    """What a round follows, per row.

    look_up: int32 [B], looked-up drafts, 0 for none. branch: bool [B], whether the exit branch drafts. matched: int32 [B], see `Lookup`.
    inner: the plan of the branch's controller.
    """

    look_up: jax.Array
    branch: jax.Array
    matched: jax.Array
    inner: Any


def expected_tokens(theta: jax.Array, lengths_L: jax.Array) -> jax.Array:
    """Tokens of a round of up to K drafts that are each accepted with probability theta: [...] and int32 [L] to [..., L]."""
    theta = theta[..., None]
    return jnp.cumsum(jnp.where(lengths_L == 0, 1.0, theta ** jnp.maximum(lengths_L, 1)), axis=-1)


@dataclasses.dataclass(frozen=True)
class Arms:
    """A bandit over sources.

    Attributes:
      inner: the controller of the exit branch; None where only lookup drafts.
      longest_match: M; beside a table of n-grams with their order added.
      exit_cost, look_cost: seconds of a round with 0, 1, ... K drafts of the branch, and with as many looked-up ones.
      prior_alpha, prior_beta, discount, idle_discount: as in `Beta`, of the branch's posterior.
      fixed: looked-up drafts wherever there is a match, whatever they cost; None to choose.
    """

    inner: Controller | None
    longest_match: int
    exit_cost: tuple[float, ...]
    look_cost: tuple[float, ...]
    prior_alpha: float
    prior_beta: float
    discount: float
    idle_discount: float
    fixed: int | None = None

    def init(self, batch: int) -> ArmsState:
        shape = (batch, self.longest_match + 1)
        # Each array has memory of its own, because the loop is given all of it.
        alpha, beta = (jnp.full(batch, prior, jnp.float32) for prior in (self.prior_alpha, self.prior_beta))
        accepted, refused = (jnp.zeros(shape, jnp.float32) for _ in range(2))
        return ArmsState(alpha, beta, accepted, refused, None if self.inner is None else self.inner.init(batch))

    def look_posterior(self, state: ArmsState, matched_B: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Alpha and beta of drafts behind matches of that length, float32 [B]."""
        pool_B = _pool_mean(state)
        accepted, refused = (jnp.take_along_axis(x, matched_B[:, None], axis=1)[:, 0] for x in (state.look_accepted, state.look_refused))
        return accepted + POOL_WEIGHT * pool_B, refused + POOL_WEIGHT * (1 - pool_B)

    def propose(self, keys_B: jax.Array, state: ArmsState, running_B: jax.Array, found: Lookup) -> ArmsPlan:
        """Draws from the posteriors and chooses; `found` is what lookup has to offer."""
        exit_keys, look_keys, inner_keys = jax.vmap(lambda key: jax.random.split(key, 3), out_axes=1)(keys_B)
        inner = None if self.inner is None else self.inner.propose(inner_keys, state.inner, running_B)
        nobody = jnp.zeros(running_B.shape, bool)
        if self.fixed is not None:
            count = jnp.where(running_B, jnp.minimum(found.count, self.fixed), 0)
            return ArmsPlan(count, nobody, found.matched, inner)
        lengths_L = jnp.arange(len(self.look_cost))
        look_theta = jax.vmap(jax.random.beta)(look_keys, *self.look_posterior(state, found.matched))
        look_tokens = expected_tokens(look_theta, lengths_L)  # [B, L]
        # A row offers no more than it found.
        look_tokens = jnp.take_along_axis(look_tokens, jnp.minimum(lengths_L, found.count[:, None]), axis=1)
        look_cost = jnp.array(self.look_cost, jnp.float32)
        if self.inner is None:
            exit_tokens, exit_cost = jnp.ones((running_B.size, 1)), look_cost[:1]
        else:
            exit_theta = jax.vmap(jax.random.beta)(exit_keys, state.exit_alpha, state.exit_beta)
            exit_tokens, exit_cost = expected_tokens(exit_theta, lengths_L), jnp.array(self.exit_cost, jnp.float32)
        exits_E = jnp.arange(exit_cost.size)
        # What a wider pass for looked-up drafts adds to a round in which the branch drafts for other rows.
        shared = look_cost[jnp.minimum(exits_E[:, None], lengths_L)]
        cost_ExL = exit_cost[:, None] + look_cost - shared
        tokens_BxExL = jnp.maximum(exit_tokens[:, :, None], look_tokens[:, None, :])
        time_ExL = cost_ExL * jnp.sum(running_B[:, None, None] / tokens_BxExL, axis=0)
        best = jnp.argmin(time_ExL)
        exit_length, look_length = best // lengths_L.size, best % lengths_L.size
        exit_gain, look_gain = exit_tokens[:, exit_length], look_tokens[:, look_length]
        looks = running_B & (look_length > 0) & (found.count > 0) & (look_gain >= exit_gain)
        branch = running_B & (exit_length > 0) & ~looks
        return ArmsPlan(jnp.where(looks, jnp.minimum(look_length, found.count), 0), branch, found.matched, inner)

    def keep_drafting(self, keys_B: jax.Array, plan: ArmsPlan, k: jax.Array, confidence_B: jax.Array) -> tuple[jax.Array, ArmsPlan]:
        """Whether the branch drafts on; never in rows with looked-up drafts."""
        if self.inner is None:
            return jnp.zeros(confidence_B.shape, bool), plan
        keep, inner = self.inner.keep_drafting(keys_B, plan.inner, k, confidence_B)
        return keep & plan.branch, plan._replace(inner=inner)

    def update(self, state: ArmsState, plan: ArmsPlan, drafted_B: jax.Array, accepted_B: jax.Array) -> ArmsState:
        """Counts go to the source that drafted; a round without the branch lets its evidence fade a little."""
        failed_B = jnp.minimum(drafted_B - accepted_B, 1)
        looked = (plan.look_up > 0) & (drafted_B > 0)
        lengths = jnp.arange(self.longest_match + 1)
        ours = looked[:, None] & ((lengths == plan.matched[:, None]) | (lengths == 0))
        by_branch = ~looked & (drafted_B > 0)

        def learn(count: jax.Array, prior: float, seen: jax.Array) -> jax.Array:
            fade = jnp.where(by_branch, self.discount, self.idle_discount)
            return prior + fade * (count - prior) + jnp.where(by_branch, seen, 0)

        inner = None
        if self.inner is not None:
            # Where lookup drafted, the branch's controller saw a round without drafts.
            counts = (jnp.where(by_branch, count, 0) for count in (drafted_B, accepted_B))
            inner = self.inner.update(state.inner, plan.inner, *counts)
        return ArmsState(
            learn(state.exit_alpha, self.prior_alpha, accepted_B),
            learn(state.exit_beta, self.prior_beta, failed_B),
            jnp.where(ours, LOOK_DISCOUNT * state.look_accepted + accepted_B[:, None], state.look_accepted),
            jnp.where(ours, LOOK_DISCOUNT * state.look_refused + failed_B[:, None], state.look_refused),
            inner,
        )

    def mean(self, state: ArmsState) -> jax.Array:
        """Of the branch's drafts, as its own controller sees it; without a branch, of looked-up drafts."""
        return _pool_mean(state) if self.inner is None else self.inner.mean(state.inner)


def _pool_mean(state: ArmsState) -> jax.Array:
    """Posterior mean of the acceptance of looked-up drafts, whatever their match, float32 [B]."""
    alpha, beta = (count[:, 0] + prior for count, prior in zip((state.look_accepted, state.look_refused), POOL_PRIOR, strict=True))
    return alpha / (alpha + beta)


@dataclasses.dataclass(frozen=True)
class ForcedArms:
    """As many drafts as the state says, int32 [B], of the branch, or of lookup where it is negative, right or wrong: for measuring."""

    def init(self, batch: int) -> jax.Array:
        return jnp.zeros(batch, jnp.int32)

    def propose(self, keys_B: jax.Array, state: jax.Array, running_B: jax.Array, found: Lookup) -> ArmsPlan:
        return ArmsPlan(jnp.maximum(-state, 0), state > 0, found.matched, state)

    def keep_drafting(self, keys_B: jax.Array, plan: ArmsPlan, k: jax.Array, confidence_B: jax.Array) -> tuple[jax.Array, ArmsPlan]:
        return k < plan.inner, plan

    def update(self, state: jax.Array, plan: ArmsPlan, drafted_B: jax.Array, accepted_B: jax.Array) -> jax.Array:
        return state

    def mean(self, state: jax.Array) -> jax.Array:
        return jnp.full(state.shape, jnp.nan, jnp.float32)
