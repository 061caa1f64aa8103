"""Lookup drafts and the bandit over sources: what is found, what is learnt from it, what is chosen, and the text that comes out."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from eesd_jax import DecodeConfig, Engine, SamplingConfig
from eesd_jax.config import DraftConfig
from eesd_jax.decode.controllers import Beta, Calibration, CostAware, Fixed, Offer, Outcome, Posterior, Replacements
from eesd_jax.decode.sources import lookup
from eesd_jax.decode.sources.bandit import LOOK_DISCOUNT, LOOK_MEAN, LOOK_WEIGHT, Arms, ArmsPlan, expected_tokens
from eesd_jax.decode.sources.lookup import Lookup, expected_drafts, look_up
from eesd_jax.engine.drafter import Drafter
from eesd_jax.errors import UserError
from eesd_jax.model.exit_branch import init_exit_branch

SETTINGS = {"prior_alpha": 1.0, "prior_beta": 1.0, "discount": 0.5, "idle_discount": 1.0}
CHEAP = {"exit_cost": (1.0, 1.5, 2.0, 2.5), "look_cost": (1.0, 1.1, 1.2, 1.3)}


def by_hand(text: list[int], longest: int, max_draft: int) -> tuple[list[int], int]:
    """The last place where the longest possible end of the text stood before, found by looking at all of them."""
    for count in range(longest, 0, -1):
        for end in range(len(text) - 1, count - 1, -1):
            if text[end - count : end] == text[-count:]:
                return text[end : end + max_draft], count
    return [], 0


def in_common(text: list[int], drafts: list[int], longest: int) -> int:
    """Tokens that the end of the text shares with that place, found by going back from both."""
    _, matched = by_hand(text, longest, 1)
    (end,) = [end for end in range(len(text) - 1, 0, -1) if text[max(0, end - matched) : end] == text[-matched:]][:1]
    count = 0
    while count < end and text[end - 1 - count] == text[-1 - count]:
        count += 1
    return count


def test_finds_what_a_search_by_hand_finds():
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, 4, size=rng.integers(1, 40)).tolist() for _ in range(200)]
    padded = np.array([text + rng.integers(0, 4, size=48 - len(text)).tolist() for text in texts], np.int32)  # what lies behind is garbage
    found = jax.jit(look_up, static_argnums=(2, 3))(padded, np.array([len(text) for text in texts], np.int32), 3, 5)
    for i, text in enumerate(texts):
        drafts, matched = by_hand(text, 3, 5)
        assert found.count[i] == len(drafts)
        assert found.tokens[i, : len(drafts)].tolist() == drafts
        if matched:
            more = in_common(text, drafts, 3) + np.arange(5)
            np.testing.assert_allclose(found.chance[i], np.array(lookup._CHANCE, np.float32)[np.minimum(more, len(lookup._CHANCE)) - 1])


def test_what_agrees_with_much_of_the_text_is_likelier():
    """A text that repeats itself: the longer it has, the more is expected of what followed; and never less behind more."""
    text = jnp.array([[*range(30)] * 2])
    chances = [float(look_up(text, jnp.array([length]), 3, 2).chance[0, 0]) for length in range(31, 58)]
    assert chances == sorted(chances)
    assert len(set(chances)) > 10
    assert list(lookup._CHANCE) == sorted(lookup._CHANCE)


def found(*counts: int, chance: float = 0.5) -> Lookup:
    rows = len(counts)
    return Lookup(jnp.zeros((rows, 3), jnp.int32), jnp.array(counts), jnp.full((rows, 3), chance))


def propose(arms: Arms, state, offer: Lookup, running: list[bool] | None = None) -> ArmsPlan:
    rows = offer.count.size
    running = jnp.ones(rows, bool) if running is None else jnp.array(running)
    return arms.propose(jax.random.split(jax.random.key(0), rows), state, Offer(running=running, found=offer))


def outcome(drafted: list[int], accepted: list[int], replaced: list[bool] | None = None) -> Outcome:
    replaced = [False] * len(drafted) if replaced is None else replaced
    return Outcome(drafted=jnp.array(drafted), accepted=jnp.array(accepted), replaced=jnp.array(replaced))


def sure(state, *, exits: float, looks: float):
    """Posteriors so narrow that a draw is their mean; of looked-up drafts half were expected to be right."""
    many = 1e6
    return state._replace(
        exit_alpha=jnp.full_like(state.exit_alpha, many * exits),
        exit_beta=jnp.full_like(state.exit_beta, many * (1 - exits)),
        look_tested=jnp.full_like(state.look_tested, many),
        look_hoped=jnp.full_like(state.look_hoped, many * 0.5),
        look_accepted=jnp.full_like(state.look_accepted, many * looks),
    )


def test_expected_tokens_of_a_round():
    np.testing.assert_allclose(expected_tokens(jnp.array([0.5, 1.0]), jnp.arange(4)), [[1, 1.5, 1.75, 1.875], [1, 2, 3, 4]])
    np.testing.assert_allclose(expected_drafts(jnp.array([[0.5, 0.5, 1.0], [1.0, 0.0, 1.0]])), [[0.5, 0.75, 1.0], [1, 1, 1]])


@pytest.mark.parametrize(
    ("exits", "looks", "offer", "looked_up", "branch"),
    [
        (0.01, 0.01, 3, 0, False),  # neither pays
        (0.01, 0.90, 3, 3, False),  # lookup does
        (0.01, 0.90, 2, 2, False),  # as far as it goes
        (0.01, 0.90, 0, 0, False),  # and only where there is a match
        (0.95, 0.05, 3, 0, True),  # the branch does
        (0.95, 0.90, 0, 0, True),
    ],
)
def test_takes_the_source_with_the_most_tokens_for_its_time(exits, looks, offer, looked_up, branch):
    arms = Arms(Fixed(2), **CHEAP, **SETTINGS)
    plan = propose(arms, sure(arms.init(1), exits=exits, looks=looks), found(offer))
    assert (int(plan.look_up[0]), bool(plan.branch[0])) == (looked_up, branch)


def test_rows_choose_for_themselves_and_finished_ones_do_nothing():
    arms = Arms(Fixed(2), exit_cost=(1.0, 1.01, 1.02, 1.03), look_cost=(1.0, 1.01, 1.02, 1.03), **SETTINGS)
    plan = propose(arms, sure(arms.init(3), exits=0.8, looks=0.9), found(3, 0, 3), running=[True, True, False])
    assert plan.look_up.tolist() == [3, 0, 0]
    assert plan.branch.tolist() == [False, True, False]


def test_a_branch_that_does_not_draft_shares_the_price_of_no_wider_pass():
    """In half of 16 rows lookup is nearly sure; a draft makes the round of all of them 1.7 times as dear, for 1.5 times the tokens."""
    dear = (1.0, 1.7, 2.4, 3.1)
    arms = Arms(CostAware(**SETTINGS, calibration=Calibration(), cost=dear), exit_cost=dear, look_cost=dear, **SETTINGS)
    offer, everyone = found(*[1, 0] * 8, chance=0.98), jnp.ones(16)

    def drafts(key):
        keys = jax.random.split(key, 16)
        plan = arms.propose(keys, arms.init(16), Offer(running=everyone > 0, found=offer))
        return plan.look_up > 0, arms.keep_drafting(keys, plan, jnp.int32(0), everyone)[0]

    looked_up, branch = jax.vmap(drafts)(jax.random.split(jax.random.key(0), 200))
    assert not (looked_up.any(axis=1) & ~branch.any(axis=1)).any()


def test_the_branchs_own_controller_is_asked_once_about_the_first_draft():
    free = (1.0, 1.01, 1.02, 1.03)
    arms = Arms(Beta(**SETTINGS), exit_cost=free, look_cost=free, **SETTINGS)
    rows = 400
    plan = propose(arms, sure(arms.init(rows), exits=0.95, looks=0.05), found(*[0] * rows))
    assert 100 < plan.branch.sum() < 300  # a coin whose bias is drawn from Beta(1, 1)
    keep, _ = arms.keep_drafting(jax.random.split(jax.random.key(5), rows), plan, jnp.int32(0), jnp.ones(rows))
    assert keep.tolist() == plan.branch.tolist()


@pytest.mark.parametrize("forced", [0, 1, 3, -1, -3])
def test_what_is_forced_is_drafted_whatever_was_learnt_and_found(forced):
    arms = dataclasses.replace(Arms(Fixed(2), **CHEAP, **SETTINGS), forced=forced)
    keys, sure_of_it = jax.random.split(jax.random.key(0), 3), jnp.ones(3)
    for exits, looks in ((0.01, 0.99), (0.99, 0.01)):
        plan = propose(arms, sure(arms.init(3), exits=exits, looks=looks), found(0, 1, 3))
        assert plan.look_up.tolist() == [max(-forced, 0)] * 3
        drafts = [arms.keep_drafting(keys, plan, jnp.int32(k), sure_of_it)[0].tolist() for k in range(4)]
        assert drafts == [[k < forced] * 3 for k in range(4)]


def test_learns_for_the_source_that_drafted():
    arms = Arms(Fixed(2), **CHEAP, **SETTINGS)
    state = arms.init(3)
    chance = jnp.array([[0.5, 0.75, 1.0]] * 3)
    plan = ArmsPlan(jnp.array([3, 0, 0]), jnp.array([False, True, False]), chance, state.inner)
    state = arms.update(state, plan, outcome([3, 2, 0], [1, 2, 0]))
    assert state.look_accepted.tolist() == [1, 0, 0]
    assert state.look_tested.tolist() == [2, 0, 0]  # what was behind the first rejection does not count
    assert state.look_hoped.tolist() == [1.25, 0, 0]
    assert state.exit_alpha.tolist() == [1, 3, 1]
    assert state.exit_beta.tolist() == [1, 1, 1]
    plan = plan._replace(look_up=jnp.array([1, 0, 0]))
    state = arms.update(state, plan, outcome([1, 0, 0], [1, 0, 0]))
    np.testing.assert_allclose(state.look_accepted[0], LOOK_DISCOUNT + 1)
    np.testing.assert_allclose(state.look_tested[0], 2 * LOOK_DISCOUNT + 1)
    np.testing.assert_allclose(state.look_hoped[0], 1.25 * LOOK_DISCOUNT + 0.5)


def test_other_candidates_are_the_branchs_and_make_its_drafts_worth_more():
    arms = Arms(Fixed(2), **CHEAP, **SETTINGS, candidates=2)
    state = arms.init(3)
    chance = jnp.array([[0.5, 0.75, 1.0]] * 3)
    plan = ArmsPlan(jnp.array([3, 0, 0]), jnp.array([False, True, True]), chance, state.inner)
    state = arms.update(state, plan, outcome([3, 2, 2], [1, 1, 1], [False, True, False]))
    assert state.replacements.rejected.tolist() == [0, 1, 1]  # of looked-up drafts there is one
    assert state.replacements.replaced.tolist() == [0, 1, 0]
    sure_of_it = state._replace(replacements=Replacements(jnp.full(3, 1e6), jnp.full(3, 1e6)))
    never = state._replace(replacements=Replacements(jnp.full(3, 1e6), jnp.zeros(3)))
    branch = [propose(arms, sure(other, exits=0.1, looks=0.01), found(0, 0, 0)).branch.tolist() for other in (sure_of_it, never)]
    assert branch == [[True] * 3, [False] * 3]


def test_chances_are_corrected_by_what_became_of_others():
    arms = Arms(None, **CHEAP, **SETTINGS)
    offered = jnp.array([[0.2, 0.5, 0.9]])
    np.testing.assert_allclose(arms.look_chance(arms.init(1), offered), offered, rtol=1e-5)
    state = sure(arms.init(1), exits=0.5, looks=0.2)  # log odds of 0.2 where those of 0.5 were expected: a quarter of the odds
    odds = offered / (1 - offered) / 4
    np.testing.assert_allclose(arms.look_chance(state, offered), odds / (1 + odds), rtol=1e-4)
    few = arms.init(1)._replace(look_tested=jnp.ones(1), look_hoped=jnp.full(1, 0.5), look_accepted=jnp.zeros(1))
    expected = Posterior(alpha=[LOOK_WEIGHT * LOOK_MEAN], beta=[1 + LOOK_WEIGHT * (1 - LOOK_MEAN)])
    np.testing.assert_allclose(arms.posterior(few), expected, rtol=1e-6)
    assert (arms.look_chance(few, offered) < offered).all()
    assert (arms.look_chance(few, offered) > arms.look_chance(state, offered)).all()


@pytest.mark.parametrize("vocabulary", [500, 100, 20])
def test_where_lookup_helps_nobody_it_costs_nothing(vocabulary):
    """Random text, which repeats a few tokens by chance, and costs as on a CPU: not 1% lost in 128 tokens, on average over rows."""
    cost, rows, start = jnp.array((1.0, 1.17, 1.33, 1.48, 1.62, 2.3, 2.3, 2.35, 2.4)), 64, 72
    arms, most = Arms(None, tuple(cost.tolist()), tuple(cost.tolist()), **SETTINGS), cost.size - 1
    texts = jax.random.randint(jax.random.key(1), (rows, start + 128 + most), 0, vocabulary)
    end = start + 127

    def propose_alone(*row):
        """For one row as if it were decoded alone: in a batch all rows draft to one length."""
        state, running, found = jax.tree.map(lambda x: x[None], row)
        plan = arms.propose(jax.random.split(jax.random.key(0), 1), state, Offer(running=running, found=found))
        return jax.tree.map(lambda x: x[0], plan)

    def one_round(carry):
        state, length, seconds = carry
        running = length < end
        found = look_up(texts, length, 3, most)
        plan = jax.vmap(propose_alone)(state, running, found)
        truth = jnp.take_along_axis(texts, length[:, None] + jnp.arange(most), axis=1)
        right = jnp.cumprod((truth == found.tokens) & (jnp.arange(most) < plan.look_up[:, None]), axis=1)
        accepted = right.sum(axis=1)
        state = arms.update(state, plan, Outcome(drafted=plan.look_up, accepted=accepted, replaced=accepted < 0))
        return state, length + jnp.where(running, 1 + accepted, 0), seconds + jnp.where(running, cost[plan.look_up], 0.0)

    begin = arms.init(rows), jnp.full(rows, start), jnp.zeros(rows)
    _, _, seconds = jax.jit(lambda: jax.lax.while_loop(lambda carry: jnp.any(carry[1] < end), one_round, begin))()
    assert (127 / seconds).mean() >= 0.99


PROMPTS = [[5, 9, 200, 31, 5, 9, 200], [7, 7], [11, 12, 13, 11, 12], [250, 3]]
OPTIONS = DecodeConfig(max_new_tokens=24, prompt_buckets=(16,), min_capacity=64)


@functools.cache
def engine(with_branch: bool) -> Engine:
    model = tiny.loaded_model()._replace(eos_ids=())
    branch = init_exit_branch(model.config, model.params, 1, "next") if with_branch else None
    draft = DraftConfig(1 if with_branch else 0, 3, (2,), longest_match=2)
    return Engine(model, OPTIONS, Drafter(branch, draft, Calibration(), trained=False))


@pytest.mark.parametrize("with_branch", [pytest.param(False, marks=pytest.mark.slow), True])
def test_greedy_text_is_that_of_plain_decoding(with_branch):
    lm = engine(with_branch)
    plain = lm.generate_ids(PROMPTS, seeds=[0] * 4, controller=None)
    arms = Arms(Fixed(2) if with_branch else None, exit_cost=(1.0, 1.01, 1.02, 1.03), look_cost=(1.0, 1.01, 1.02, 1.03), **SETTINGS)
    drafted = lm.generate_ids(PROMPTS, seeds=[0] * 4, controller=arms)
    assert [generation.token_ids for generation in drafted] == [generation.token_ids for generation in plain]
    logs = [generation.log for generation in drafted]
    assert any(log.looked_up.any() for log in logs)
    assert sum(log.accepted[log.looked_up].sum() for log in logs) > 0  # a tiny greedy model soon repeats itself
    if with_branch:
        assert any((log.drafted[~log.looked_up] > 0).any() for log in logs)
    alone = [lm.generate_ids([prompt], seeds=[0], controller=arms)[0].token_ids for prompt in PROMPTS]
    assert alone == [generation.token_ids for generation in plain]


def test_sampled_text_ends_where_the_budget_does():
    generations = engine(True).generate_ids(
        PROMPTS, seeds=[1, 2, 3, 4], sampling=SamplingConfig(temperature=1.0), controller=Arms(Fixed(2), **CHEAP, **SETTINGS)
    )
    assert all(len(generation.token_ids) == OPTIONS.max_new_tokens for generation in generations)
    assert all(generation.log.committed.sum() == OPTIONS.max_new_tokens for generation in generations)


def test_controllers_by_name_and_those_that_need_the_branch():
    lm = engine(False)
    assert lm.controller("plain") is None
    assert lm.controller("fixed:2").fixed == 2
    by_name, plain = (lm.generate_ids(PROMPTS, seeds=[0] * 4, controller=name) for name in ("fixed:2", "plain"))
    assert [generation.token_ids for generation in by_name] == [generation.token_ids for generation in plain]
    assert sum(generation.accepted for generation in by_name) > 0
    with pytest.raises(UserError, match="'beta' needs an exit branch, and only lookup drafts"):
        lm.controller("beta")


def test_where_lookup_alone_is_faster_the_branch_is_there_for_controllers_that_need_it():
    read = []

    def spare() -> Drafter:
        read.append(1)
        return engine(True).drafter

    alone = engine(False)
    lm = Engine(alone.model, OPTIONS, alone.drafter, spare)
    plain, by_lookup = (lm.generate_ids(PROMPTS, seeds=[0] * 4, controller=name) for name in ("plain", "fixed:2"))
    assert not read
    drafted = lm.generate_ids(PROMPTS, seeds=[0] * 4, controller=Arms(Fixed(2), **CHEAP, **SETTINGS))
    assert read == [1]
    assert [one.token_ids for one in drafted] == [one.token_ids for one in by_lookup] == [one.token_ids for one in plain]
    assert any((one.log.drafted[~one.log.looked_up] > 0).any() for one in drafted)
    assert lm.with_branch.branch is not None and lm.branch is None
