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

from eesd_jax.decode.controllers import Controller, Fixed, Offer, Outcome, Posterior, Replacements, Setup, draw_beta
from eesd_jax.decode.costs import RoundCosts
from eesd_jax.decode.sources.lookup import expected_drafts

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


class _Exits(NamedTuple):
    """What the branch has to offer. tokens: float32 [B, L], expected. cost: float32 [L]. wanted: bool [B]. inner: its controller's plan."""

    tokens: jax.Array
    cost: jax.Array
    wanted: jax.Array
    inner: Any


def expected_tokens(theta: jax.Array, lengths_L: jax.Array) -> jax.Array:
    """Tokens of a round of up to K drafts that are each accepted with probability theta: [...] and int32 [L] to [..., L]."""
    theta = theta[..., None]
    return jnp.cumsum(jnp.where(lengths_L == 0, 1.0, theta ** jnp.maximum(lengths_L, 1)), axis=-1)


def _log_odds(chance: jax.Array) -> jax.Array:
    chance = jnp.clip(chance, _LEAST_CHANCE, 1 - _LEAST_CHANCE)
    return jnp.log(chance) - jnp.log1p(-chance)


@dataclasses.dataclass(frozen=True)
class Arms(Controller):
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

    needs_branch = False
    chooses_source = True

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

    @classmethod
    def over(cls, controller: Controller, setup: Setup) -> "Arms":
        """Puts the bandit before the controller of the exit branch.

        A fixed length is that of looked-up drafts, too. Without a branch, of other controllers nothing is left.
        """
        costs = setup.costs or RoundCosts((), ())
        return cls(
            inner=controller if setup.has_branch else None,
            exit_cost=costs.exit,
            look_cost=costs.look_up,
            **setup.prior,
            fixed=controller.length if isinstance(controller, Fixed) else None,
            candidates=setup.candidates,
        )

    def init(self, batch: int) -> ArmsState:
        """Believes the priors."""
        # Each array has memory of its own, because the loop is given all of it.
        return ArmsState(
            exit_alpha=jnp.full(batch, self.prior_alpha, jnp.float32),
            exit_beta=jnp.full(batch, self.prior_beta, jnp.float32),
            look_tested=jnp.zeros(batch, jnp.float32),
            look_hoped=jnp.zeros(batch, jnp.float32),
            look_accepted=jnp.zeros(batch, jnp.float32),
            inner=None if self.inner is None else self.inner.init(batch),
            replacements=Replacements.none(batch, self.candidates),
        )

    def look_chance(self, state: ArmsState, chance_BxK: jax.Array) -> jax.Array:
        """The chance of looked-up drafts, corrected by what the row's drafts have taught, float32 [B, K]."""
        hoped = (state.look_hoped + LOOK_WEIGHT * LOOK_MEAN) / (state.look_tested + LOOK_WEIGHT)
        shift_B = _log_odds(_look_posterior(state).mean) - _log_odds(hoped)
        return jax.nn.sigmoid(_log_odds(chance_BxK) + shift_B[:, None])

    def propose(self, keys_B: jax.Array, state: ArmsState, offer: Offer) -> ArmsPlan:
        """Draws from the posteriors, and chooses."""
        exit_keys, inner_keys, first_keys = jax.vmap(lambda key: jax.random.split(key, 3), out_axes=1)(keys_B)
        inner = None if self.inner is None else self.inner.propose(inner_keys, state.inner, Offer(running=offer.running))
        if self.fixed is not None:
            count = jnp.where(offer.running, jnp.minimum(offer.found.count, self.fixed), 0)
            branch = offer.running & (count == 0) & (self.fixed > 0) & (self.inner is not None)
            plan = ArmsPlan(look_up=count, branch=branch, chance=offer.found.chance, inner=inner)
        else:
            looks = self._tokens_of_lookup(state, offer)
            exits = self._tokens_of_branch(exit_keys, first_keys, state, inner)
            plan = self._choose(offer, exits, looks)
        is_forced = self.forced != NOT_FORCED
        look_up = jnp.where(is_forced, jnp.maximum(-self.forced, 0), plan.look_up)
        return plan._replace(look_up=look_up, branch=jnp.where(is_forced, self.forced > 0, plan.branch))

    def _tokens_of_lookup(self, state: ArmsState, offer: Offer) -> jax.Array:
        """Expects so many tokens of a round with 0, 1, ... looked-up drafts, [B, L]."""
        lengths_L = jnp.arange(len(self.look_cost))
        right_BxK = expected_drafts(self.look_chance(state, offer.found.chance))
        tokens_BxL = 1 + jnp.pad(right_BxK, ((0, 0), (1, 0)))
        # A row offers no more than it found.
        return jnp.take_along_axis(tokens_BxL, jnp.minimum(lengths_L, offer.found.count[:, None]), axis=1)

    def _tokens_of_branch(self, exit_keys: jax.Array, first_keys: jax.Array, state: ArmsState, inner: Any) -> _Exits:
        """Expects so many tokens of a round with 0, 1, ... drafts of the branch; of none, where there is no branch.

        Where its own controller will not have it draft, the branch gives nothing that a wider pass could be shared with.
        """
        batch = state.exit_alpha.shape[0]
        if self.inner is None:
            cost = jnp.array(self.look_cost, jnp.float32)[:1]
            return _Exits(tokens=jnp.ones((batch, 1)), cost=cost, wanted=jnp.zeros(batch, bool), inner=inner)
        lengths_L = jnp.arange(len(self.look_cost))
        theta_B = draw_beta(exit_keys, state.exit_alpha, state.exit_beta)
        tokens_BxL = expected_tokens(theta_B, lengths_L)
        if state.replacements is not None:
            some_rejected_BxL = 1 - theta_B[:, None] ** lengths_L
            tokens_BxL += state.replacements.chance(self.candidates)[:, None] * some_rejected_BxL
        wanted, inner = self.inner.keep_drafting(first_keys, inner, jnp.int32(0), jnp.ones(batch, jnp.float32))
        wanted = jnp.broadcast_to(wanted, batch)  # one answer for all rows will do
        tokens_BxL = jnp.where(wanted[:, None], tokens_BxL, 1.0)
        return _Exits(tokens=tokens_BxL, cost=jnp.array(self.exit_cost, jnp.float32), wanted=wanted, inner=inner)

    def _choose(self, offer: Offer, exits: _Exits, look_tokens: jax.Array) -> ArmsPlan:
        """Takes the pair of lengths with the least time per expected token; in each row the source that then gives more."""
        lengths_L, exits_E = jnp.arange(len(self.look_cost)), jnp.arange(exits.cost.size)
        look_cost = jnp.array(self.look_cost, jnp.float32)
        # What a wider pass for looked-up drafts adds to a round in which the branch drafts for other rows.
        shared = look_cost[jnp.minimum(exits_E[:, None], lengths_L)]
        cost_ExL = exits.cost[:, None] + look_cost - shared
        tokens_BxExL = jnp.maximum(exits.tokens[:, :, None], look_tokens[:, None, :])
        time_ExL = cost_ExL * jnp.sum(offer.running[:, None, None] / tokens_BxExL, axis=0)
        best = jnp.argmin(time_ExL)
        exit_length, look_length = best // lengths_L.size, best % lengths_L.size
        exit_gain, look_gain = exits.tokens[:, exit_length], look_tokens[:, look_length]
        looks = offer.running & (look_length > 0) & (offer.found.count > 0) & (look_gain >= exit_gain)
        return ArmsPlan(
            look_up=jnp.where(looks, jnp.minimum(look_length, offer.found.count), 0),
            branch=offer.running & (exit_length > 0) & ~looks & exits.wanted,
            chance=offer.found.chance,
            inner=exits.inner,
        )

    def look_up(self, plan: ArmsPlan, offer: Offer) -> jax.Array:
        """Takes as many looked-up drafts as were chosen."""
        return plan.look_up

    def keep_drafting(self, keys_B: jax.Array, plan: ArmsPlan, k: jax.Array, confidence_B: jax.Array) -> tuple[jax.Array, ArmsPlan]:
        """Whether the branch drafts on; never in rows with looked-up drafts."""
        if self.inner is None:
            return jnp.zeros(confidence_B.shape, bool), plan
        keep, inner = self.inner.keep_drafting(keys_B, plan.inner, k, confidence_B)
        # About the first draft it was asked already.
        is_first = k == 0
        keep, inner = keep | is_first, jax.tree.map(lambda old, new: jnp.where(is_first, old, new), plan.inner, inner)
        return jnp.where(self.forced != NOT_FORCED, k < self.forced, keep) & plan.branch, plan._replace(inner=inner)

    def update(self, state: ArmsState, plan: ArmsPlan, outcome: Outcome) -> ArmsState:
        """Counts go to the source that drafted; a round without the branch lets its evidence fade a little."""
        drafted_B, accepted_B = outcome.drafted, outcome.accepted
        failed_B = jnp.minimum(drafted_B - accepted_B, 1)
        looked = (plan.look_up > 0) & (drafted_B > 0)
        tested_B = accepted_B + failed_B  # what lies after the first rejection was not tested
        hoped_B = jnp.sum(jnp.where(jnp.arange(plan.chance.shape[1]) < tested_B[:, None], plan.chance, 0.0), axis=1)
        by_branch = ~looked & (drafted_B > 0)
        fade = jnp.where(by_branch, self.discount, self.idle_discount)

        def of_branch(count: jax.Array, prior: float, seen: jax.Array) -> jax.Array:
            return prior + fade * (count - prior) + jnp.where(by_branch, seen, 0)

        def of_lookup(count: jax.Array, seen: jax.Array) -> jax.Array:
            return jnp.where(looked, LOOK_DISCOUNT * count + seen, count)

        inner, replacements = None, state.replacements
        if self.inner is not None:
            # Where lookup drafted, the branch's controller saw a round without drafts, and no other candidate was tested.
            drafted, accepted = (jnp.where(by_branch, count, 0) for count in (drafted_B, accepted_B))
            inner = self.inner.update(state.inner, plan.inner, outcome._replace(drafted=drafted, accepted=accepted))
        if replacements is not None:
            replacements = replacements.learn(fade, jnp.where(by_branch, failed_B, 0), outcome.replaced)
        return ArmsState(
            exit_alpha=of_branch(state.exit_alpha, self.prior_alpha, accepted_B),
            exit_beta=of_branch(state.exit_beta, self.prior_beta, failed_B),
            look_tested=of_lookup(state.look_tested, tested_B),
            look_hoped=of_lookup(state.look_hoped, hoped_B),
            look_accepted=of_lookup(state.look_accepted, accepted_B),
            inner=inner,
            replacements=replacements,
        )

    def posterior(self, state: ArmsState) -> Posterior | None:
        """Of the branch's drafts, as its own controller sees it; without a branch, of looked-up drafts."""
        return _look_posterior(state) if self.inner is None else self.inner.posterior(state.inner)


def _look_posterior(state: ArmsState) -> Posterior:
    """Acceptance of looked-up drafts."""
    rejected = state.look_tested - state.look_accepted
    return Posterior(alpha=state.look_accepted + LOOK_WEIGHT * LOOK_MEAN, beta=rejected + LOOK_WEIGHT * (1 - LOOK_MEAN))
