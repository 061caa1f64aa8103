"""Each controller against its definition: posteriors worked by hand, probabilities by counting, lengths by enumeration."""

import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from eesd_jax.decode.controllers import (
    Beta,
    Calibrated,
    Calibration,
    Controller,
    CostAware,
    CostState,
    Fixed,
    Offer,
    Outcome,
    Posterior,
    Replacements,
    Threshold,
    draw_beta,
)
from eesd_jax.decode.controllers.replacements import REPLACED_MEAN

MAX_DRAFT = 8
SIGMAS = 4.5  # a false alarm in 150,000
PRIOR = {"prior_alpha": 2.0, "prior_beta": 1.0, "discount": 0.5, "idle_discount": 0.75}
CPU_COST = (26.4, 49.9, 61.0, 70.0, 79.6, 88.6, 95.8, 108.3, 116.0)
BETA = Beta(**PRIOR)
CALIBRATED = Calibrated(**PRIOR, calibration=Calibration(1.3, 0.2), kappa=4.0, capacity=10.0)
COST_AWARE = CostAware(**PRIOR, calibration=Calibration(1.3, 0.2), cost=CPU_COST)
PER_ROW = [Fixed(3), Threshold(0.6), BETA, Beta(**PRIOR, censored=False), CALIBRATED]
LEARNING = [BETA, Beta(**PRIOR, censored=False), CALIBRATED, COST_AWARE]


def keys_of(rows: int, seed: int = 0) -> jax.Array:
    return jax.random.split(jax.random.key(seed), rows)


@functools.partial(jax.jit, static_argnames=("controller", "max_draft"))
def draft(
    controller: Controller,
    state: Any,
    keys_B: jax.Array,
    confidence_BxK: jax.Array,
    running_B: jax.Array | None = None,
    max_draft: int = MAX_DRAFT,
) -> tuple[jax.Array, Any]:
    """Drafts of each row in one round, int32 [B], and the plan in the end."""
    rows = keys_B.shape[0]
    running_B = jnp.ones(rows, bool) if running_B is None else running_B
    fold_in = jax.vmap(jax.random.fold_in, (0, None))

    def ask(carry, xs):
        (keep, count, plan), (k, confidence_B) = carry, xs
        wanted, plan = controller.keep_drafting(fold_in(keys_B, k), plan, k, confidence_B)
        keep = keep & wanted & (k < max_draft)
        return (keep, count + keep, plan), None

    plan = controller.propose(fold_in(keys_B, MAX_DRAFT + 1), state, Offer(running=running_B))
    confidence_LxB = jnp.concatenate([jnp.ones((1, rows)), confidence_BxK[:, :max_draft].T])
    start = running_B, jnp.zeros(rows, jnp.int32), plan
    return jax.lax.scan(ask, start, (jnp.arange(max_draft + 1), confidence_LxB))[0][1:]


def outcome(drafted: Any, accepted: Any, replaced: Any = None) -> Outcome:
    drafted, accepted = jnp.asarray(drafted), jnp.asarray(accepted)
    return Outcome(drafted=drafted, accepted=accepted, replaced=jnp.zeros(drafted.shape, bool) if replaced is None else jnp.array(replaced))


def learn(controller: Controller, rounds: list[tuple[int, int]], confidence_K: tuple[float, ...] = (0.5,) * MAX_DRAFT) -> Any:
    """The state of one row after some rounds of (drafted, accepted)."""
    state = controller.init(1)
    for drafted, accepted in rounds:
        plan = controller.propose(keys_of(1), state, Offer(running=jnp.array([True])))
        for k in range(drafted + 1):
            confidence = jnp.array([confidence_K[k - 1] if k else 1.0])
            _, plan = controller.keep_drafting(keys_of(1), plan, jnp.int32(k), confidence)
        state = controller.update(state, plan, outcome([drafted], [accepted]))
    return state


def assert_share(hits: np.ndarray, probability: float) -> None:
    """The share of independent trials agrees with a probability."""
    bound = SIGMAS * math.sqrt(probability * (1 - probability) / hits.size)
    assert abs(hits.mean() - probability) < bound, (hits.mean(), probability, bound)


# --- Posteriors ---


@pytest.mark.parametrize(
    ("rounds", "alpha", "censored_beta", "plain_beta"),
    [
        ([], 2, 1, 1),
        ([(4, 2)], 4, 2, 3),  # 2 accepted; of the two others only the first was tested
        ([(4, 2), (3, 3)], 2 + 0.5 * 2 + 3, 1 + 0.5 * 1, 1 + 0.5 * 2),
        ([(4, 2), (3, 3), (0, 0)], 2 + 0.75 * 4, 1 + 0.75 * 0.5, 1 + 0.75 * 1),
        ([(4, 2), (3, 3), (0, 0), (5, 0)], 2 + 0.5 * 3, 1 + 0.5 * 0.375 + 1, 1 + 0.5 * 0.75 + 5),
    ],
)
def test_posteriors_are_those_worked_by_hand(rounds, alpha, censored_beta, plain_beta):
    for controller, beta in [(BETA, censored_beta), (Beta(**PRIOR, censored=False), plain_beta), (CALIBRATED, censored_beta)]:
        state = learn(controller, rounds)
        np.testing.assert_allclose([state.alpha[0], state.beta[0]], [alpha, beta], rtol=1e-6)
        np.testing.assert_allclose(controller.posterior(state), [[alpha], [beta]], rtol=1e-6)
    state = learn(COST_AWARE, rounds)
    np.testing.assert_allclose([state.alpha[0], state.beta[0]], [alpha, censored_beta], rtol=1e-6)


def test_without_discount_counts_add_up():
    rng = np.random.default_rng(0)
    drafted = rng.integers(0, MAX_DRAFT + 1, (50, 3))
    accepted = np.minimum(drafted, rng.integers(0, MAX_DRAFT + 1, (50, 3)))
    controller = Beta(2.0, 1.0, discount=1.0, idle_discount=1.0)
    state = controller.init(3)
    for row_drafted, row_accepted in zip(drafted, accepted, strict=True):
        state = controller.update(state, None, outcome(row_drafted, row_accepted))
    np.testing.assert_allclose(state.alpha, 2 + accepted.sum(axis=0))
    np.testing.assert_allclose(state.beta, 1 + (accepted < drafted).sum(axis=0))


@pytest.mark.parametrize("controller", LEARNING, ids=lambda c: type(c).__name__)
def test_a_round_without_drafts_teaches_nothing_and_only_forgets(controller):
    before = learn(controller, [(6, 5), (4, 0), (8, 8)])
    prior = controller.init(1)
    after = before
    for _ in range(3):
        plan = controller.propose(keys_of(1), after, Offer(running=jnp.array([True])))
        after = controller.update(after, plan, outcome([0], [0]))
    for old, new, start in zip(*map(jax.tree.leaves, (before, after, prior)), strict=True):
        np.testing.assert_allclose(new - start, 0.75**3 * (old - start), rtol=1e-4)


def test_the_state_that_learns_nothing_stays():
    for controller in (Fixed(2), Threshold(0.5)):
        state = controller.init(4)
        updated = controller.update(state, state, outcome([3, 2, 1, 0], [1, 2, 0, 0]))
        jax.tree.map(np.testing.assert_array_equal, updated, state)
        assert controller.posterior(state) is None


def test_what_the_confidence_predicted_is_counted_for_the_drafts_that_were_tested():
    controller = CostAware(1.0, 2.0, discount=0.5, idle_discount=0.75, calibration=Calibration(), cost=CPU_COST)
    confidence = (0.9, 0.8, 0.5, 0.25)
    # Accepted 1 of 3: the first two were tested. Then all of 4. Then nothing. Then none of 2: the first was tested.
    steps = [((3, 1), 0.9 + 0.8), ((4, 4), 0.9 + 0.8 + 0.5 + 0.25), ((0, 0), 0.0), ((2, 0), 0.9)]
    expected, rounds = 1.0, []
    for played, predicted in steps:
        expected = 1.0 + (0.5 if played[0] else 0.75) * (expected - 1.0) + predicted
        rounds.append(played)
        np.testing.assert_allclose(learn(controller, rounds, confidence).predicted, expected, rtol=1e-5)


def test_the_confidence_is_corrected_by_what_was_found():
    controller = CostAware(1.0, 1.0, discount=1.0, idle_discount=1.0, calibration=Calibration(), cost=CPU_COST)
    # Of 8 drafts 6 were predicted and 4 found: odds of 3 where there are odds of 1. So odds of 9 are odds of 3.
    state = CostState(jnp.array([4.0]), jnp.array([4.0]), jnp.array([6.0]))
    plan = controller.propose(keys_of(1), state, Offer(running=jnp.array([True])))
    _, plan = controller.keep_drafting(keys_of(1), plan, jnp.int32(0), jnp.array([1.0]))
    np.testing.assert_allclose([plan.survival[0], plan.expected[0]], [1, 1])
    _, plan = controller.keep_drafting(keys_of(1), plan, jnp.int32(1), jnp.array([0.9]))
    np.testing.assert_allclose([plan.survival[0], plan.expected[0]], [0.75, 1.75], rtol=1e-5)
    # Odds of 1 are odds of 1/3.
    _, plan = controller.keep_drafting(keys_of(1), plan, jnp.int32(2), jnp.array([0.5]))
    np.testing.assert_allclose([plan.survival[0], plan.expected[0]], [0.75 * 0.25, 1.75 + 0.75 * 0.25], rtol=1e-5)


def test_rejections_that_another_candidate_replaced_are_counted():
    controller = CostAware(**PRIOR, calibration=Calibration(), cost=CPU_COST, candidates=2)
    state = controller.init(2)
    np.testing.assert_allclose(state.replacements.chance(2), REPLACED_MEAN)
    np.testing.assert_allclose(state.replacements.chance(3), 1 - (1 - REPLACED_MEAN) ** 2, rtol=1e-6)
    plan = controller.propose(keys_of(2), state, Offer(running=jnp.ones(2, bool)))
    for drafted, accepted, replaced in [((3, 2), (1, 1), (True, False)), ((2, 2), (2, 0), (False, True)), ((0, 1), (0, 0), (False, True))]:
        state = controller.update(state, plan, outcome(drafted, accepted, replaced))
    # Where all are accepted nothing was rejected. A discount of 0.5 with drafts, of 0.75 without.
    np.testing.assert_allclose(state.replacements.rejected, [(1 * 0.5 + 0) * 0.75, (1 * 0.5 + 1) * 0.5 + 1], rtol=1e-6)
    np.testing.assert_allclose(state.replacements.replaced, [(1 * 0.5 + 0) * 0.75, (0 * 0.5 + 1) * 0.5 + 1], rtol=1e-6)


def test_another_candidate_counts_where_a_draft_is_rejected():
    """The length is the best one with a token more wherever not all drafts are kept, as often as another candidate stood in for one."""
    chance, cost = 0.9, (1.0, 1.5, 1.9, 2.2, 2.4, 2.5, 2.6, 2.7, 2.8)
    controller = CostAware(**PRIOR, calibration=Calibration(), cost=cost, candidates=2)
    found = []
    for theta in (0.1, 0.4, 0.6, 0.8):
        counts = Replacements(jnp.array([1e6]), jnp.array([chance * 1e6]))
        count, _ = draft(controller, sure(theta)._replace(replacements=counts), keys_of(1), jnp.full((1, MAX_DRAFT), theta))
        tokens = [
            [expected_tokens(length, [], theta) + other * (1 - theta**length) for length in range(len(cost))] for other in (chance, 0)
        ]
        best, best_alone = (np.argmax(np.divide(of_length, cost)) for of_length in tokens)
        assert count[0] == best
        found.append(best != best_alone)
    assert any(found)


@pytest.mark.parametrize("discount", [0.0, 0.9, 1.0])
def test_posteriors_stay_proper_on_any_text(discount):
    """Thousands of rounds of the worst kind: all or nothing accepted, and a confidence of exactly 0 or 1."""
    rows, rounds = 64, 2000
    controller = CostAware(0.5, 0.5, discount=discount, idle_discount=discount, calibration=Calibration(3.0, 1.0), cost=CPU_COST)
    draw = np.random.default_rng(1)
    drafted = jnp.array(draw.integers(0, MAX_DRAFT + 1, (rounds, rows)))
    luck = jnp.array(draw.random((1, rows)) < np.linspace(0, 1, rows))  # rows that always win, and rows that never do
    confidence = jnp.array(draw.integers(0, 2, (rounds, rows, MAX_DRAFT)), jnp.float32)

    def play_round(state, xs):
        drafted_B, confidence_BxK, seed = xs
        plan = controller.propose(keys_of(rows, seed), state, Offer(running=jnp.ones(rows, bool)))
        ok = jnp.isfinite(plan.theta) & (plan.theta >= 0) & (plan.theta <= 1) & jnp.isfinite(plan.correction)
        said = jax.vmap(jax.vmap(controller.calibration))(confidence_BxK)
        state = controller.update(state, plan._replace(confidence=said), outcome(drafted_B, jnp.where(luck[0], drafted_B, 0)))
        return state, (ok, state)

    _, (ok, states) = jax.lax.scan(play_round, controller.init(rows), (drafted, confidence, jnp.arange(rounds)))
    assert ok.all()
    assert (states.alpha >= 0.5).all()
    assert (states.beta >= 0.5).all()
    assert (states.predicted > 0).all()
    assert (states.predicted < states.alpha + states.beta).all()


# --- What is drawn ---


def test_draws_from_beta_follow_its_law():
    shapes = [(0.3, 2.0), (1.0, 1.0), (2.0, 5.0), (200.0, 50.0), (5000.0, 3000.0)]
    rows = 20_000
    alpha_B, beta_B = (jnp.repeat(jnp.array(values), rows) for values in zip(*shapes, strict=True))
    draws = np.asarray(jax.jit(draw_beta)(keys_of(alpha_B.size), alpha_B, beta_B)).reshape(-1, rows)
    for (alpha, beta), of_shape in zip(shapes, draws, strict=True):
        assert stats.kstest(of_shape, stats.beta(alpha, beta).cdf).pvalue > 1e-5


def test_draws_from_beta_are_probabilities_for_any_counts():
    counts = jnp.repeat(jnp.array([1e-6, 1.0, 1e6, 1e30]), 1000)
    for other in (1e-6, 1.0, 1e30):
        draws = np.asarray(jax.jit(draw_beta)(keys_of(counts.size), counts, jnp.full(counts.size, other)))
        assert ((draws >= 0) & (draws <= 1)).all()


# --- Whether to draft on ---


def test_beta_drafts_on_with_probability_theta_drawn_once_a_round():
    rows = 20_000
    state = Posterior(jnp.full(rows, 3.0), jnp.full(rows, 2.0))
    count = np.asarray(draft(BETA, state, keys_of(rows), jnp.ones((rows, MAX_DRAFT)))[0])
    # Moments of Beta(3, 2): one theta a round, so two drafts come with E[theta^2], and not with E[theta]^2 = 0.36.
    assert_share(count >= 1, 3 / 5)
    assert_share(count >= 2, 3 * 4 / (5 * 6))
    assert_share(count >= 3, 3 * 4 * 5 / (5 * 6 * 7))


def test_lengths_for_one_theta_are_geometric():
    rows, theta = 20_000, 0.7
    plan = jnp.full(rows, theta)
    keep, count = jnp.ones(rows, bool), jnp.zeros(rows, jnp.int32)
    for k in range(MAX_DRAFT):
        wanted, _ = BETA.keep_drafting(keys_of(rows, k), plan, jnp.int32(k), jnp.ones(rows))
        keep = keep & wanted
        count = count + keep
    expected = [(1 - theta) * theta**length for length in range(MAX_DRAFT)] + [theta**MAX_DRAFT]
    observed = np.bincount(count, minlength=MAX_DRAFT + 1)
    assert stats.chisquare(observed, rows * np.array(expected)).pvalue > 1e-5


def test_theta_of_exactly_zero_and_one():
    plan = jnp.array([0.0, 1.0])
    for seed in range(200):
        keep, _ = BETA.keep_drafting(keys_of(2, seed), plan, jnp.int32(0), jnp.ones(2))
        assert keep.tolist() == [False, True]


@pytest.mark.parametrize("alpha", [3.0, 30.0, 3000.0])
def test_the_confidence_counts_as_kappa_drafts_of_a_capped_posterior(alpha):
    rows, confidence = 20_000, 0.9
    state = Posterior(jnp.full(rows, alpha), jnp.full(rows, alpha * 2))
    capped = min(3 * alpha, CALIBRATED.capacity)
    plan = CALIBRATED.propose(keys_of(rows), state, Offer(running=jnp.ones(rows, bool)))
    np.testing.assert_allclose(plan.alpha, capped / 3, rtol=1e-6)
    np.testing.assert_allclose(plan.beta, capped * 2 / 3, rtol=1e-6)
    # Before the first draft there is no confidence, whatever the argument says.
    keep, _ = CALIBRATED.keep_drafting(keys_of(rows, 1), plan, jnp.int32(0), jnp.full(rows, confidence))
    assert_share(np.asarray(keep), 1 / 3)
    s = 1 / (1 + math.exp(-(1.3 * math.log(9) + 0.2)))
    keep, _ = CALIBRATED.keep_drafting(keys_of(rows, 2), plan, jnp.int32(1), jnp.full(rows, confidence))
    assert_share(np.asarray(keep), (capped / 3 + 4 * s) / (capped + 4))


def test_calibration():
    confidence = jnp.array([0.0, 0.2, 0.5, 0.8, 1.0])
    np.testing.assert_allclose(Calibration()(confidence), confidence, atol=1e-6)
    np.testing.assert_allclose(Calibration(2.0, 0.0)(jnp.array(0.8)), 16 / 17, rtol=1e-5)  # odds of 4, squared
    np.testing.assert_allclose(Calibration(1.0, math.log(2))(jnp.array(0.5)), 2 / 3, rtol=1e-5)  # odds of 1, doubled
    assert np.isfinite(Calibration(5.0, -3.0).log_odds(confidence)).all()


@pytest.mark.parametrize(
    ("minimum", "expected"),
    [(0.0, 5), (0.3, 4), (0.31, 4), (0.8, 4), (0.81, 2), (0.9, 2), (0.95, 1), (1.0, 1)],
)
def test_threshold_stops_behind_the_first_draft_below_it(minimum, expected):
    """Always one draft: before it, nothing is known. A draft of exactly the threshold is no reason to stop."""
    confidence = jnp.array([[0.9, 0.8, 0.8, 0.25, 0.9]])
    count, _ = draft(Threshold(minimum), Threshold(minimum).init(1), keys_of(1), confidence, max_draft=5)
    assert count.tolist() == [expected]


@pytest.mark.parametrize("length", [0, 1, 5, MAX_DRAFT])
def test_fixed(length):
    count, _ = draft(Fixed(length), Fixed(length).init(3), keys_of(3), jnp.full((3, MAX_DRAFT), 0.1))
    assert count.tolist() == [length] * 3


# --- Rows ---


def some_states(controller: Controller, rows: int) -> Any:
    """A different state in every row, with leading axis `rows`."""
    rng = np.random.default_rng(7)
    state = controller.init(rows)
    if not isinstance(state, (Posterior, CostState)):
        return state
    alpha, beta = rng.uniform(0.5, 20, (2, rows)).astype(np.float32)
    return type(state)(*map(jnp.array, (alpha, beta, (alpha + beta) * rng.uniform(0.2, 0.9, rows).astype(np.float32))[: len(state)]))


@pytest.mark.parametrize("controller", PER_ROW, ids=lambda c: f"{type(c).__name__}-{getattr(c, 'censored', '')}")
def test_a_row_in_a_batch_does_what_it_does_alone(controller):
    rows = 6
    state, keys = some_states(controller, rows), keys_of(rows)
    confidence = jnp.array(np.random.default_rng(3).uniform(0.3, 1, (rows, MAX_DRAFT)), jnp.float32)
    count, plan = draft(controller, state, keys, confidence)
    accepted = count // 2
    after = controller.update(state, plan, outcome(count, accepted))
    for row in range(rows):
        alone = jax.tree.map(lambda leaf, row=row: leaf[row : row + 1], state)
        count_alone, plan_alone = draft(controller, alone, keys[row : row + 1], confidence[row : row + 1])
        assert count_alone[0] == count[row]
        after_alone = controller.update(alone, plan_alone, outcome(count_alone, accepted[row : row + 1]))
        for leaf, leaf_alone in zip(jax.tree.leaves(after), jax.tree.leaves(after_alone), strict=True):
            np.testing.assert_array_equal(leaf[row], leaf_alone[0])
    if isinstance(controller, Beta):
        assert len(set(count.tolist())) > 1, "rows that all do the same prove nothing"


def test_cost_aware_drafts_one_length_in_all_rows_that_run():
    rows, lengths = 6, set()
    state = some_states(COST_AWARE, rows)._replace(alpha=jnp.array([1.0, 5, 10, 20, 40, 80]), beta=jnp.ones(rows))
    confidence = jnp.array(np.random.default_rng(4).uniform(0.6, 1, (rows, MAX_DRAFT)), jnp.float32)
    running = jnp.array([True, True, False, True, False, True])
    for seed in range(20):
        count, _ = draft(COST_AWARE, state, keys_of(rows, seed), confidence, running)
        assert len(set(count[running].tolist())) == 1
        lengths.add(int(count[0]))
        # What a finished row believes, draws and sees does not matter; nor does its being there.
        other = jax.tree.map(lambda leaf: jnp.where(running, leaf, leaf[::-1] * 3), state)
        other_confidence = jnp.where(running[:, None], confidence, 0.01)
        other_keys = jnp.where(running, keys_of(rows, seed), keys_of(rows, 1000 + seed))
        np.testing.assert_array_equal(draft(COST_AWARE, other, other_keys, other_confidence, running)[0], count)
        few = jax.tree.map(lambda leaf: leaf[running], (state, keys_of(rows, seed), confidence))
        assert draft(COST_AWARE, *few)[0].tolist() == [int(count[0])] * 4
    assert len(lengths) > 1
    nobody = draft(COST_AWARE, state, keys_of(rows), confidence, jnp.zeros(rows, bool))[0]
    assert nobody.tolist() == [0] * rows


@pytest.mark.parametrize("controller", [*PER_ROW, COST_AWARE], ids=lambda c: type(c).__name__)
def test_controllers_are_pure(controller):
    """Alike in Python and under jit, twice the same, and arguments are left as they were; equal settings are equal."""
    state, keys, confidence = some_states(controller, 4), keys_of(4), jnp.full((4, MAX_DRAFT), 0.7)
    before = jax.tree.map(np.array, state)
    jitted, plan = draft(controller, state, keys, confidence)
    with jax.disable_jit():
        eager, _ = draft(controller, state, keys, confidence)
    np.testing.assert_array_equal(jitted, eager)
    np.testing.assert_array_equal(jitted, draft(controller, state, keys, confidence)[0])
    updated = [update(state, plan, outcome(jitted, jitted // 2)) for update in (controller.update, jax.jit(controller.update))]
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), *updated)
    assert jax.tree.structure(updated[0]) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, before, state)
    assert hash(controller) == hash(type(controller)(**vars(controller)))
    assert controller == type(controller)(**vars(controller))


# --- cost_aware against enumeration ---

COSTS = {
    "measured": CPU_COST,
    "flat verification": tuple(1 + 0.08 * k for k in range(9)),
    "dear drafts": tuple(1 + 1.2 * k for k in range(9)),
    "free drafts": (1.0,) * 9,
    "steps": (1.0, 1.05, 1.1, 1.6, 1.65, 1.7, 1.75, 2.6, 2.7),
    "not monotone": (1.0, 1.4, 1.2, 1.9, 1.3, 2.2, 1.8, 1.7, 2.5),
}


def sure(*thetas: float) -> CostState:
    """So many counts that every draw is theta, and the confidence needs no correction."""
    theta = jnp.array(thetas, jnp.float32)
    return CostState(theta * 1e10, (1 - theta) * 1e10, theta * 1e10)


def expected_tokens(length: int, sampled: list[float], theta: float) -> float:
    """1 + P(first accepted) + P(first two accepted) + ...: sampled drafts have their own probability, drafts to come theta."""
    chances = [*sampled, *[theta] * (length - len(sampled))]
    return 1 + sum(math.prod(chances[: n + 1]) for n in range(length))


def best_length(cost: tuple[float, ...], thetas: list[float], confidence_BxK: np.ndarray) -> int | None:
    """The rule, played by enumeration: look at all lengths still possible before every draft. None where float32 could not decide."""
    for k in range(len(cost)):
        time = {
            length: sum(
                cost[length] / expected_tokens(length, list(sampled[:k]), theta)
                for theta, sampled in zip(thetas, confidence_BxK, strict=True)
            )
            for length in range(k, len(cost))
        }
        best, *others = sorted(time, key=time.get)
        if others and time[others[0]] < time[best] * (1 + 1e-5):
            return None
        if best == k:
            return k
    raise AssertionError("a length beyond the longest")


@pytest.mark.parametrize("name", COSTS)
def test_cost_aware_picks_the_length_that_enumeration_picks(name):
    cost, lengths = COSTS[name], []
    controller = CostAware(1.0, 1.0, discount=1.0, idle_discount=1.0, calibration=Calibration(), cost=cost)
    for theta in (0.31, 0.37, 0.52, 0.68, 0.74, 0.81, 0.87, 0.93, 0.985):
        confidence = np.full((1, MAX_DRAFT), theta)
        count = int(draft(controller, sure(theta), keys_of(1), jnp.array(confidence, jnp.float32))[0][0])
        # With nothing seen in between that was not foreseen, the first plan is kept.
        rate = [expected_tokens(length, [], theta) / cost[length] for length in range(len(cost))]
        assert count == np.argmax(rate) == best_length(cost, [theta], confidence)
        lengths.append(count)
    assert lengths == sorted(lengths)
    if name == "dear drafts":
        assert lengths == [0] * len(lengths)
    elif name == "free drafts":
        assert lengths == [MAX_DRAFT] * len(lengths)
    else:
        assert len(set(lengths)) >= 2


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", COSTS)
def test_cost_aware_follows_the_confidence_as_enumeration_does(name, rows):
    cost, rng, lengths = COSTS[name], np.random.default_rng(5), []
    controller = CostAware(1.0, 1.0, discount=1.0, idle_discount=1.0, calibration=Calibration(), cost=cost)
    for _ in range(60):
        thetas, confidence = rng.uniform(0.3, 0.95, rows), rng.beta(2.0, 0.5, (rows, MAX_DRAFT)).clip(0.02, 0.98)
        count, _ = draft(controller, sure(*thetas), keys_of(rows), jnp.array(confidence, jnp.float32))
        best = best_length(cost, list(thetas), confidence)
        if best is not None:
            assert count.tolist() == [best] * rows
            lengths.append(best)
    assert len(lengths) > 40
    assert len(set(lengths)) > 1 or rows > 1 or name in ("dear drafts", "free drafts")


def test_cost_matters_by_its_ratios_only():
    state, confidence = some_states(COST_AWARE, 1), jnp.full((1, MAX_DRAFT), 0.8)
    seconds = CostAware(**PRIOR, calibration=COST_AWARE.calibration, cost=tuple(value / 1e4 for value in CPU_COST))
    for seed in range(10):
        assert draft(seconds, state, keys_of(1, seed), confidence)[0] == draft(COST_AWARE, state, keys_of(1, seed), confidence)[0]


def test_who_has_given_up_notices_when_drafts_pay_again():
    """After a hopeless stretch the draws explore: drafts come back while all that happens is rounds without any."""
    rows = 400
    controller = CostAware(1.0, 1.0, discount=0.9, idle_discount=0.95, calibration=Calibration(), cost=CPU_COST)
    hopeless = CostState(jnp.full(rows, 1.0), jnp.full(rows, 31.0), jnp.full(rows, 1.0))
    confidence = jnp.full((rows, MAX_DRAFT), 0.9)
    alone = jax.jit(jax.vmap(lambda state, key, confidence: draft(controller, state, key[None], confidence[None])[0][0]))
    idle = controller.propose(keys_of(rows), hopeless, Offer(running=jnp.ones(rows, bool))), outcome([0] * rows, [0] * rows)
    rested = jax.lax.fori_loop(0, 200, lambda _, state: controller.update(state, *idle), hopeless)
    share = [
        float(np.mean(np.asarray(alone(jax.tree.map(lambda leaf: leaf[:, None], state), keys_of(rows), confidence)) > 0))
        for state in (hopeless, rested, controller.init(rows))
    ]
    assert share[0] < 0.01
    assert share[1] > 0.15
    assert share[1] == pytest.approx(share[2], abs=0.05)


def test_posteriors_find_the_acceptance_of_a_text():
    """Drafting by its own rule on a text of known acceptance, every learning controller comes to believe it: censoring leaves no bias."""
    rows, rounds = 512, 25
    prior = {"prior_alpha": 1.0, "prior_beta": 1.0, "discount": 1.0, "idle_discount": 1.0}
    controllers = [
        Beta(**prior),
        Calibrated(**prior, calibration=Calibration(), kappa=0.0, capacity=1e9),
        CostAware(**prior, calibration=Calibration(), cost=COSTS["flat verification"]),
    ]
    for controller, acceptance in itertools.product(controllers, (0.3, 0.7)):
        state = controller.init(rows)
        for index in range(rounds):
            confidence = jnp.full((rows, MAX_DRAFT), 0.6)
            count, plan = draft(controller, state, keys_of(rows, index), confidence)
            hits = jax.random.uniform(jax.random.key(1000 + index), (rows, MAX_DRAFT)) < acceptance
            accepted = jnp.minimum(count, jnp.sum(jnp.cumprod(hits, axis=1), axis=1))
            state = controller.update(state, plan, outcome(count, accepted))
        tested = np.asarray(state.alpha + state.beta) - 2
        pooled = (np.asarray(state.alpha).sum() - rows) / tested.sum()
        assert abs(pooled - acceptance) < SIGMAS * math.sqrt(acceptance * (1 - acceptance) / tested.sum()) + 1e-3
