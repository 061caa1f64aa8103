"""Which source drafts in a round: the exit branch, lookup in the text, or nothing (a bandit; ours).

Each row holds a Beta posterior of the acceptance of the branch's drafts, and a round draws from it (Thompson sampling). Looked-up drafts
say themselves how likely they are (`lookup.py`, `ngrams.py`); by how much a row's text is easier or harder than that, its drafts so far
tell, as a difference of log odds. So a text in which no such draft is right soon costs nothing. Of all pairs of lengths (one for the rows
that the branch drafts for, one for those with looked-up drafts) the bandit takes the pair with the least measured time per expected token.
The branch is offered only where its own controller wants a first draft, and where it is chosen that says when to stop.

Axes: B rows, K drafts at most, L = K + 1 lengths of a draft.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from eesd_jax.decode.controllers import Controller, Replacements, draw_beta
from eesd_jax.decode.sources.lookup import Lookup, expected_drafts

# Chosen by replaying answers of the built-in model, greedy and sampled, and random texts, in which lookup is never right. A draw, as for
# the branch, cost 1% there: drafts that are tried anyway teach enough about the others.
LOOK_WEIGHT = 2.0  # drafts as expected that every text begins with
LOOK_MEAN = 0.3  # of which so many were right
LOOK_DISCOUNT = 0.985
_LEAST_CHANCE = 1e-3
NOT_FORCED = 2**31 - 1


class ArmsState(NamedTuple):
    """exit_alpha, exit_beta: float32 [B]. inner: of the branch's controller, or None.

    look_tested, look_hoped, look_accepted: float32 [B], discounted counts of looked-up drafts whose turn came, of how many of them were
    expected to be right, and of how many were. replacements: of the branch's rejected drafts; None where a place has one candidate.
    """

    exit_alpha: jax.Array
    exit_beta: jax.Array
    look_tested: jax.Array
    look_hoped: jax.Array
    look_accepted: jax.Array
    inner: Any
    replacements: Replacements | None


class ArmsPlan(NamedTuple):
    """What a round follows, per row.

    look_up: int32 [B], looked-up drafts, 0 for none. branch: bool [B], whether the exit branch drafts. chance: float32 [B, K], see
    `Lookup`. inner: the plan of the branch's controller.
    """

    look_up: jax.Array
    branch: jax.Array
    chance: jax.Array
    inner: Any


def expected_tokens(theta: jax.Array, lengths_L: jax.Array) -> jax.Array:
    """Tokens of a round of up to K drafts that are each accepted with probability theta: [...] and int32 [L] to [..., L]."""
    theta = theta[..., None]
    return jnp.cumsum(jnp.where(lengths_L == 0, 1.0, theta ** jnp.maximum(lengths_L, 1)), axis=-1)


def _log_odds(chance: jax.Array) -> jax.Array:
    chance = jnp.clip(chance, _LEAST_CHANCE, 1 - _LEAST_CHANCE)
    return jnp.log(chance) - jnp.log1p(-chance)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Arms:
    """A bandit over sources.

    Attributes:
      inner: the controller of the exit branch; None where only lookup drafts.
      exit_cost, look_cost: seconds of a round with 0, 1, ... K drafts of the branch, and with as many looked-up ones.
      prior_alpha, prior_beta, discount, idle_discount: as in `Beta`, of the branch's posterior.
      fixed: looked-up drafts wherever there is a match, whatever they cost; None to choose.
      forced: drafts of the branch in every row, or, where it is negative, of lookup, right or wrong: to measure what a round costs with the
        program that will decode. `NOT_FORCED` otherwise.
      candidates: see `DraftConfig`.
    """

    inner: Controller | None
    exit_cost: tuple[float, ...]
    look_cost: tuple[float, ...]
    prior_alpha: float
    prior_beta: float
    discount: float
    idle_discount: float
    fixed: int | None = None
    forced: int = NOT_FORCED
    candidates: int = dataclasses.field(default=1, metadata={"static": True})

    def init(self, batch: int) -> ArmsState:
        # Each array has memory of its own, because the loop is given all of it.
        alpha, beta = (jnp.full(batch, prior, jnp.float32) for prior in (self.prior_alpha, self.prior_beta))
        counts = (jnp.zeros(batch, jnp.float32) for _ in range(3))
        inner = None if self.inner is None else self.inner.init(batch)
        return ArmsState(alpha, beta, *counts, inner, Replacements.none(batch, self.candidates))

    def look_chance(self, state: ArmsState, chance_BxK: jax.Array) -> jax.Array:
        """The chance of looked-up drafts, corrected by what the row's drafts have taught, float32 [B, K]."""
        hoped = (state.look_hoped + LOOK_WEIGHT * LOOK_MEAN) / (state.look_tested + LOOK_WEIGHT)
        shift_B = _log_odds(_look_mean(state)) - _log_odds(hoped)
        return jax.nn.sigmoid(_log_odds(chance_BxK) + shift_B[:, None])

    def propose(self, keys_B: jax.Array, state: ArmsState, running_B: jax.Array, found: Lookup) -> ArmsPlan:
        """Draws from the posteriors and chooses; `found` is what lookup has to offer."""
        plan = self._choose(keys_B, state, running_B, found)
        is_forced = self.forced != NOT_FORCED
        look_up = jnp.where(is_forced, jnp.maximum(-self.forced, 0), plan.look_up)
        return plan._replace(look_up=look_up, branch=jnp.where(is_forced, self.forced > 0, plan.branch))

    def _choose(self, keys_B: jax.Array, state: ArmsState, running_B: jax.Array, found: Lookup) -> ArmsPlan:
        exit_keys, inner_keys, first_keys = jax.vmap(lambda key: jax.random.split(key, 3), out_axes=1)(keys_B)
        inner = None if self.inner is None else self.inner.propose(inner_keys, state.inner, running_B)
        nobody = jnp.zeros(running_B.shape, bool)
        if self.fixed is not None:
            count = jnp.where(running_B, jnp.minimum(found.count, self.fixed), 0)
            return ArmsPlan(count, nobody, found.chance, inner)
        lengths_L = jnp.arange(len(self.look_cost))
        right_BxK = expected_drafts(self.look_chance(state, found.chance))
        look_tokens = 1 + jnp.pad(right_BxK, ((0, 0), (1, 0)))  # [B, L]
        # A row offers no more than it found.
        look_tokens = jnp.take_along_axis(look_tokens, jnp.minimum(lengths_L, found.count[:, None]), axis=1)
        look_cost = jnp.array(self.look_cost, jnp.float32)
        if self.inner is None:
            exit_tokens, exit_cost, wanted = jnp.ones((running_B.size, 1)), look_cost[:1], nobody
        else:
            exit_theta = draw_beta(exit_keys, state.exit_alpha, state.exit_beta)
            exit_tokens, exit_cost = expected_tokens(exit_theta, lengths_L), jnp.array(self.exit_cost, jnp.float32)
            if state.replacements is not None:
                some_rejected_BxL = 1 - exit_theta[:, None] ** lengths_L
                exit_tokens += state.replacements.chance(self.candidates)[:, None] * some_rejected_BxL
            # Where its own controller will not have it draft, the branch gives nothing that a wider pass could be shared with.
            wanted, inner = self.inner.keep_drafting(first_keys, inner, jnp.int32(0), jnp.ones(running_B.shape, jnp.float32))
            exit_tokens = jnp.where(wanted[:, None], exit_tokens, 1.0)
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
        branch = running_B & (exit_length > 0) & ~looks & wanted
        return ArmsPlan(jnp.where(looks, jnp.minimum(look_length, found.count), 0), branch, found.chance, inner)

    def keep_drafting(self, keys_B: jax.Array, plan: ArmsPlan, k: jax.Array, confidence_B: jax.Array) -> tuple[jax.Array, ArmsPlan]:
        """Whether the branch drafts on; never in rows with looked-up drafts."""
        if self.inner is None:
            return jnp.zeros(confidence_B.shape, bool), plan
        keep, inner = self.inner.keep_drafting(keys_B, plan.inner, k, confidence_B)
        # About the first draft it was asked already.
        is_first = k == 0
        keep, inner = keep | is_first, jax.tree.map(lambda old, new: jnp.where(is_first, old, new), plan.inner, inner)
        return jnp.where(self.forced != NOT_FORCED, k < self.forced, keep) & plan.branch, plan._replace(inner=inner)

    def update(
        self, state: ArmsState, plan: ArmsPlan, drafted_B: jax.Array, accepted_B: jax.Array, replaced_B: jax.Array | None = None
    ) -> ArmsState:
        """Counts go to the source that drafted; a round without the branch lets its evidence fade a little."""
        failed_B = jnp.minimum(drafted_B - accepted_B, 1)
        looked = (plan.look_up > 0) & (drafted_B > 0)
        tested_B = accepted_B + failed_B  # what lies behind the first rejection was not tested
        hoped_B = jnp.sum(jnp.where(jnp.arange(plan.chance.shape[1]) < tested_B[:, None], plan.chance, 0.0), axis=1)
        by_branch = ~looked & (drafted_B > 0)

        def learn(count: jax.Array, prior: float, seen: jax.Array) -> jax.Array:
            fade = jnp.where(by_branch, self.discount, self.idle_discount)
            return prior + fade * (count - prior) + jnp.where(by_branch, seen, 0)

        inner, replacements = None, state.replacements
        if self.inner is not None:
            # Where lookup drafted, the branch's controller saw a round without drafts, and no other candidate was tested.
            counts = (jnp.where(by_branch, count, 0) for count in (drafted_B, accepted_B))
            more = () if replaced_B is None else (replaced_B,)
            inner = self.inner.update(state.inner, plan.inner, *counts, *more)
        if replacements is not None:
            fade = jnp.where(by_branch, self.discount, self.idle_discount)
            replacements = replacements.learn(fade, jnp.where(by_branch, failed_B, 0), replaced_B)
        return ArmsState(
            learn(state.exit_alpha, self.prior_alpha, accepted_B),
            learn(state.exit_beta, self.prior_beta, failed_B),
            *(
                jnp.where(looked, LOOK_DISCOUNT * count + seen, count)
                for count, seen in ((state.look_tested, tested_B), (state.look_hoped, hoped_B), (state.look_accepted, accepted_B))
            ),
            inner,
            replacements,
        )

    def mean(self, state: ArmsState) -> jax.Array:
        """Of the branch's drafts, as its own controller sees it; without a branch, of looked-up drafts."""
        return _look_mean(state) if self.inner is None else self.inner.mean(state.inner)


def _look_mean(state: ArmsState) -> jax.Array:
    """Acceptance of looked-up drafts, float32 [B]."""
    return (state.look_accepted + LOOK_WEIGHT * LOOK_MEAN) / (state.look_tested + LOOK_WEIGHT)
