"""Lookup drafts and the bandit over sources: what is found, what is learnt from it, what is chosen, and the text that comes out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from eesd_jax import DecodeConfig, Engine, SamplingConfig
from eesd_jax.config import DraftConfig
from eesd_jax.decode.arms import LOOK_DISCOUNT, POOL_PRIOR, POOL_WEIGHT, Arms, ArmsPlan, expected_tokens
from eesd_jax.decode.controllers import Calibration, Fixed
from eesd_jax.decode.lookup import Lookup, look_up
from eesd_jax.engine import Drafter
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


def test_finds_what_a_search_by_hand_finds():
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, 4, size=rng.integers(1, 40)).tolist() for _ in range(200)]
    padded = np.array([text + rng.integers(0, 4, size=48 - len(text)).tolist() for text in texts], np.int32)  # what lies behind is garbage
    found = jax.jit(look_up, static_argnums=(2, 3))(padded, np.array([len(text) for text in texts], np.int32), 3, 5)
    for i, text in enumerate(texts):
        drafts, matched = by_hand(text, 3, 5)
        assert found.matched[i] == matched
        assert found.count[i] == len(drafts)
        assert found.tokens[i, : len(drafts)].tolist() == drafts


def found(*counts: int, matched: int = 2) -> Lookup:
    rows = len(counts)
    return Lookup(jnp.zeros((rows, 3), jnp.int32), jnp.array(counts), jnp.array([matched if count else 0 for count in counts]))


def propose(arms: Arms, state, offer: Lookup, running: list[bool] | None = None) -> ArmsPlan:
    rows = offer.count.size
    running = jnp.ones(rows, bool) if running is None else jnp.array(running)
    return arms.propose(jax.random.split(jax.random.key(0), rows), state, running, offer)


def sure(state, *, exits: float, looks: float):
    """Posteriors so narrow that a draw is their mean."""
    many = 1e6
    return state._replace(
        exit_alpha=jnp.full_like(state.exit_alpha, many * exits),
        exit_beta=jnp.full_like(state.exit_beta, many * (1 - exits)),
        look_accepted=jnp.full_like(state.look_accepted, many * looks),
        look_refused=jnp.full_like(state.look_refused, many * (1 - looks)),
    )


def test_expected_tokens_of_a_round():
    np.testing.assert_allclose(expected_tokens(jnp.array([0.5, 1.0]), jnp.arange(4)), [[1, 1.5, 1.75, 1.875], [1, 2, 3, 4]])


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
    arms = Arms(Fixed(2), 2, **CHEAP, **SETTINGS)
    plan = propose(arms, sure(arms.init(1), exits=exits, looks=looks), found(offer))
    assert (int(plan.look_up[0]), bool(plan.branch[0])) == (looked_up, branch)


def test_rows_choose_for_themselves_and_finished_ones_do_nothing():
    arms = Arms(Fixed(2), 2, exit_cost=(1.0, 1.01, 1.02, 1.03), look_cost=(1.0, 1.01, 1.02, 1.03), **SETTINGS)
    plan = propose(arms, sure(arms.init(3), exits=0.8, looks=0.9), found(3, 0, 3), running=[True, True, False])
    assert plan.look_up.tolist() == [3, 0, 0]
    assert plan.branch.tolist() == [False, True, False]


def test_learns_for_the_source_that_drafted():
    arms = Arms(Fixed(2), 2, **CHEAP, **SETTINGS)
    state = arms.init(3)
    plan = ArmsPlan(jnp.array([3, 0, 0]), jnp.array([False, True, False]), jnp.array([2, 2, 0]), state.inner)
    state = arms.update(state, plan, jnp.array([3, 2, 0]), jnp.array([1, 2, 0]))
    assert state.look_accepted.tolist() == [[1, 0, 1], [0, 0, 0], [0, 0, 0]]  # row 0: one accepted, with a match of 2
    assert state.look_refused.tolist() == [[1, 0, 1], [0, 0, 0], [0, 0, 0]]  # and what was behind the first rejection does not count
    assert state.exit_alpha.tolist() == [1, 3, 1]
    assert state.exit_beta.tolist() == [1, 1, 1]
    plan = plan._replace(look_up=jnp.array([1, 0, 0]), matched=jnp.array([1, 0, 0]))
    state = arms.update(state, plan, jnp.array([1, 0, 0]), jnp.array([1, 0, 0]))
    np.testing.assert_allclose(state.look_accepted[0], [LOOK_DISCOUNT + 1, 1, 1])
    np.testing.assert_allclose(state.look_refused[0], [LOOK_DISCOUNT, 0, 1])


def test_each_length_of_a_match_begins_around_all_of_them():
    arms = Arms(None, 2, **CHEAP, **SETTINGS)
    state = arms.init(1)._replace(look_accepted=jnp.array([[2.5, 2.0, 0.5]]), look_refused=jnp.array([[4.0, 1.0, 3.0]]))
    mean = (POOL_PRIOR[0] + 2.5) / (sum(POOL_PRIOR) + 6.5)
    for matched, (accepted, refused) in enumerate([(2.0, 1.0), (0.5, 3.0)], start=1):
        alpha, beta = arms.look_posterior(state, jnp.array([matched]))
        np.testing.assert_allclose(alpha, accepted + POOL_WEIGHT * mean, rtol=1e-6)
        np.testing.assert_allclose(beta, refused + POOL_WEIGHT * (1 - mean), rtol=1e-6)
    np.testing.assert_allclose(arms.mean(state), mean, rtol=1e-6)


def test_where_no_looked_up_draft_is_right_lookup_costs_nothing():
    """A run of 128 tokens with a match in every round and costs as measured on CPU: not 1% lost, on average over rows."""
    costs = (24.0, 25.3, 26.0, 30.5, 30.5, 34.0, 34.0, 34.0, 34.0)
    arms, rows = Arms(None, 3, costs, costs, **SETTINGS), 256

    def one_round(carry, i):
        state, seconds = carry
        key = jax.random.fold_in(jax.random.key(0), i)
        found = Lookup(jnp.zeros((1, 8), jnp.int32), jnp.full(1, 8), jax.random.randint(key, 1, 1, 4))
        plan = arms.propose(jax.random.split(key, 1), state, jnp.ones(1, bool), found)
        return (arms.update(state, plan, plan.look_up, plan.look_up * 0), seconds + jnp.array(costs)[plan.look_up[0]]), None

    def run(row):
        return jax.lax.scan(one_round, (arms.init(1), 0.0), 1000 * row + jnp.arange(127))[0][1]

    seconds = jax.jit(jax.vmap(run))(jnp.arange(rows))
    assert 127 * costs[0] / seconds.mean() >= 0.99


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
    arms = Arms(Fixed(2) if with_branch else None, 2, exit_cost=(1.0, 1.01, 1.02, 1.03), look_cost=(1.0, 1.01, 1.02, 1.03), **SETTINGS)
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
        PROMPTS, seeds=[1, 2, 3, 4], sampling=SamplingConfig(temperature=1.0), controller=Arms(Fixed(2), 2, **CHEAP, **SETTINGS)
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
