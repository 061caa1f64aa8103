"""The law of the output, by exact enumeration on a tiny model through the real jitted decoder; and planted bugs that must break it.

Each cell is a chi-square test of whole texts against their exact probabilities. With fixed seeds a correct decoder passes always.
"""

import dataclasses
import functools
import itertools
import re
import types
from collections import Counter
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import tiny
from scipy import stats

from eesd_jax.config import DraftConfig
from eesd_jax.decode import accept as verify
from eesd_jax.decode import controllers, loop, sampling
from eesd_jax.decode import draft as drafting
from eesd_jax.decode import round as speculative
from eesd_jax.decode.draft import Speculation
from eesd_jax.decode.sampling import Sampling
from eesd_jax.decode.sources import ngrams
from eesd_jax.decode.sources.bandit import Arms
from eesd_jax.model import exit_branch, llama
from eesd_jax.model.tree import Tree

VOCABULARY, BUDGET, EOS, ROWS = 5, 4, 4, 2000
PROMPTS = ([1, 2, 3], [0, 3])  # rows of different lengths, side by side
SETTINGS = [
    (temperature, *filters) for temperature in (0.5, 1.0) for filters in [(0, 1.0, 0.0), (3, 1.0, 0.0), (0, 0.8, 0.0), (0, 1.0, 0.3)]
]
DRAFT = DraftConfig(exit_layer=1, max_draft=3, verify_widths=(2,))
BETA = {"prior_alpha": 3.0, "prior_beta": 1.0, "discount": 0.9, "idle_discount": 0.95}
CALIBRATION = controllers.Calibration(1.5, 0.2)
CONTROLLERS = {
    "fixed:1": controllers.Fixed(1),
    "fixed:3": controllers.Fixed(3),
    "threshold": controllers.Threshold(0.4),
    "beta": controllers.Beta(**BETA),
    "calibrated": controllers.Calibrated(**BETA, calibration=CALIBRATION, kappa=4.0, capacity=20.0),
    "cost_aware": controllers.CostAware(**BETA, calibration=CALIBRATION, cost=(1.0, 1.3, 1.5, 1.7)),
}
COSTS = {"exit_cost": (1.0, 1.2, 1.4, 1.6), "look_cost": (1.0, 1.1, 1.2, 1.3)}
LOOKUP = {
    "lookup alone, fixed": Arms(None, **COSTS, **BETA, fixed=3),
    "lookup alone": Arms(None, **COSTS, **BETA),
    "lookup and fixed:3": Arms(controllers.Fixed(3), **COSTS, **BETA),
    "lookup and cost_aware": Arms(CONTROLLERS["cost_aware"], **COSTS, **BETA),
    "n-grams alone, fixed": Arms(None, **COSTS, **BETA, fixed=3),
    "n-grams and cost_aware": Arms(CONTROLLERS["cost_aware"], **COSTS, **BETA),
}
DEEP = ("fixed:3", "cost_aware")  # controllers of a branch with the second input
# Several candidates for a place: how many, the controller, and whether the branch has the second input.
TREES = {
    "2, fixed:3": (2, CONTROLLERS["fixed:3"], False),
    "3, cost_aware": (3, CONTROLLERS["cost_aware"], False),
    "2, second input": (2, CONTROLLERS["fixed:3"], True),
    "2, lookup": (2, LOOKUP["lookup and cost_aware"], False),
}
# Cells that every run of the tests draws, one at least for each part of the law; the others are slow.
OFTEN = ("fixed:3", "beta", "cost_aware", "2, fixed:3", "lookup and cost_aware", "n-grams alone, fixed")
NGRAMS = jnp.asarray(ngrams.build(np.random.default_rng(0).integers(0, VOCABULARY, (20, 12)).tolist(), 1024))
CONFIG = tiny.config(vocab_size=VOCABULARY, num_hidden_layers=3, hidden_size=16, intermediate_size=32)
# Bonferroni over controllers x draft vocabularies x prompts x settings, at one false alarm in a thousand suites.
BOUND = 1e-3 / ((len(CONTROLLERS) * 2 + len(DEEP) + len(TREES) + len(LOOKUP)) * len(PROMPTS) * len(SETTINGS))


def cells(names: Iterable[str], often: Sequence[str] = OFTEN) -> list:
    """Values of a test's parameter."""
    return [pytest.param(name, marks=() if name in often else pytest.mark.slow) for name in names]


@pytest.fixture(scope="module")
def params() -> llama.Params:
    values = tiny.params(CONFIG, seed=3)
    return values | {"lm_head": values["lm_head"] * 2.0}  # further from uniform


def branch_of(params: llama.Params, draft_ids: list[int], *, deep_input: bool = False) -> exit_branch.ExitBranch:
    return exit_branch.init_exit_branch(CONFIG, params, DRAFT.exit_layer, "next", jnp.array(draft_ids), deep_input=deep_input)


@pytest.fixture(scope="module")
def exact(params: llama.Params) -> dict[tuple[int, int], dict[tuple[int, ...], float]]:
    """The distribution of texts for each prompt and setting, by whole passes without a cache."""
    prefixes = [list(itertools.product(range(VOCABULARY), repeat=length)) for length in range(BUDGET)]

    @jax.jit
    def last_logits(tokens: jax.Array) -> jax.Array:
        start = jnp.zeros(tokens.shape[0], jnp.int32)
        x, _ = llama.forward_blocks(CONFIG, params["blocks"], llama.embed(params, tokens), start, None, range(CONFIG.num_layers))
        return llama.logits(CONFIG, params, x)[:, -1]

    laws = {}
    for p, prompt in enumerate(PROMPTS):
        rows = [np.asarray(last_logits(jnp.array([[*prompt, *text] for text in texts]))) for texts in prefixes]
        table = {text: row for texts, logits in zip(prefixes, rows, strict=True) for text, row in zip(texts, logits, strict=True)}
        for s, setting in enumerate(SETTINGS):
            laws[p, s] = reference.enumerate_texts(table.__getitem__, VOCABULARY, BUDGET, [EOS], setting)
    return laws


def draw_texts(
    params: llama.Params,
    branch: exit_branch.ExitBranch | None,
    controller: controllers.Controller,
    draft: DraftConfig = DRAFT,
    table: jax.Array | None = None,
) -> dict[tuple[int, int], Counter]:
    """Texts drawn by the decoder: all prompts and settings are rows of one batch."""
    cells = [(p, s) for p in range(len(PROMPTS)) for s in range(len(SETTINGS))] * ROWS
    width = max(map(len, PROMPTS))
    prompts = jnp.array([PROMPTS[p] + [0] * (width - len(PROMPTS[p])) for p, _ in cells], jnp.int32)
    length = jnp.array([len(PROMPTS[p]) for p, _ in cells], jnp.int32)
    settings = Sampling(*(jnp.array([SETTINGS[s][i] for _, s in cells], dtype) for i, dtype in enumerate((float, int, float, float))))

    spec = Speculation(
        config=CONFIG,
        draft=draft,
        controller=controller,
        eos_ids=jnp.array([EOS], jnp.int32),
        params=params,
        branch=branch,
        sampling=settings,
        ngrams=table,
    )

    # Arguments all: what a program holds as constants takes XLA far longer to compile.
    @jax.jit
    def run(spec: Speculation, keys: jax.Array, prompts: jax.Array, length: jax.Array) -> loop.DecodeState:
        model, exit_layer = (CONFIG, spec.params, spec.branch), draft.exit_layer
        state, exits = loop.prefill(*model, prompts, length, length + BUDGET, keys, exit_layer=exit_layer, capacity=12, chunk=8)
        state = speculative.start_drafting(draft, spec.branch, spec.controller, state, exits)

        return loop.decode(functools.partial(speculative.round_step, spec), state, jnp.int32(100))

    state = run(spec, jax.random.split(jax.random.key(0), len(cells)), prompts, length)
    tokens, ends = np.asarray(state.tokens), np.asarray(state.length)
    counts = {cell: Counter() for cell in cells[: len(PROMPTS) * len(SETTINGS)]}
    for i, cell in enumerate(cells):
        counts[cell][tuple(tokens[i, len(PROMPTS[cell[0]]) : ends[i]].tolist())] += 1
    return counts


def p_value(counts: Counter, law: dict[tuple[int, ...], float]) -> float:
    """Of a chi-square test; texts that are expected less than five times are taken together. A text that cannot be is certain evidence."""
    if set(counts) - set(law):
        return 0.0
    total = counts.total()
    common = [text for text, probability in law.items() if probability * total >= 5]
    expected = np.array([law[text] * total for text in common])
    observed = np.array([counts[text] for text in common])
    rest = total - expected.sum()
    if rest > 1e-6 * total:
        expected, observed = np.append(expected, rest), np.append(observed, total - observed.sum())
    return float(stats.chi2.sf(np.sum((observed - expected) ** 2 / expected), max(len(expected) - 1, 1)))


def smallest_p_value(counts: dict[tuple[int, int], Counter], exact: dict[tuple[int, int], dict[tuple[int, ...], float]]) -> float:
    return min(p_value(counts[cell], exact[cell]) for cell in exact)


@pytest.mark.parametrize("name", cells(CONTROLLERS))
def test_texts_follow_the_law_of_the_target(params: llama.Params, exact: dict, name: str):
    assert smallest_p_value(draw_texts(params, branch_of(params, [0, 2, 4]), CONTROLLERS[name]), exact) > BOUND


@pytest.mark.parametrize("name", cells(DEEP, often=["cost_aware"]))
def test_texts_follow_the_law_with_a_second_input(params: llama.Params, exact: dict, name: str):
    assert smallest_p_value(draw_texts(params, branch_of(params, [0, 2, 4], deep_input=True), CONTROLLERS[name]), exact) > BOUND


def draw_with_candidates(params: llama.Params, name: str, sharpness: float = 0.1) -> dict[tuple[int, int], Counter]:
    """By default with a branch that prefers no token, so that first candidates are often refused."""
    candidates, controller, deep_input = TREES[name]
    draft = dataclasses.replace(DRAFT, candidates=candidates, longest_match=2 if isinstance(controller, Arms) else 0)
    branch = branch_of(params, [0, 2, 4], deep_input=deep_input)
    return draw_texts(params, branch._replace(head=sharpness * branch.head), controller, draft)


@pytest.mark.parametrize("name", cells(TREES))
def test_texts_follow_the_law_with_several_candidates(params: llama.Params, exact: dict, name: str):
    assert smallest_p_value(draw_with_candidates(params, name), exact) > BOUND


def draw_with_lookup(params: llama.Params, name: str) -> dict[tuple[int, int], Counter]:
    controller = LOOKUP[name]
    branch = None if controller.inner is None else branch_of(params, [0, 2, 4])
    table = NGRAMS if name.startswith("n-grams") else None
    draft = dataclasses.replace(DRAFT, exit_layer=0 if branch is None else DRAFT.exit_layer, longest_match=2)
    return draw_texts(params, branch, controller, draft, table)


@pytest.mark.parametrize("name", cells(LOOKUP))
def test_texts_follow_the_law_with_lookup(params: llama.Params, exact: dict, name: str):
    assert smallest_p_value(draw_with_lookup(params, name), exact) > BOUND


@pytest.mark.slow
@pytest.mark.parametrize("name", CONTROLLERS)
def test_texts_follow_the_law_when_the_whole_vocabulary_is_drafted(params: llama.Params, exact: dict, name: str):
    assert smallest_p_value(draw_texts(params, branch_of(params, list(range(VOCABULARY))), CONTROLLERS[name]), exact) > BOUND


# Planted bugs: each changes the law, and each must be seen.


def wrong_q(monkeypatch: pytest.MonkeyPatch) -> None:
    accept = verify.accept
    monkeypatch.setattr(
        verify, "accept", lambda keys, drafts, *rest: accept(keys, drafts._replace(probs=jnp.roll(drafts.probs, 1, axis=2)), *rest)
    )


def argmax_drafted_softmax_as_q(monkeypatch: pytest.MonkeyPatch) -> None:
    def draw(keys: jax.Array, logits: jax.Array, settings: Sampling) -> sampling.Draw:
        return sampling.Draw(jnp.argmax(logits, axis=1).astype(jnp.int32), sampling.probabilities(logits, sampling.warp(logits, settings)))

    monkeypatch.setattr(drafting, "sample", draw)


def target_unwarped(monkeypatch: pytest.MonkeyPatch) -> None:
    as_it_is = Sampling(jnp.ones(1), jnp.zeros(1, jnp.int32), jnp.ones(1), jnp.zeros(1))
    monkeypatch.setattr(verify, "warp", lambda logits, settings: sampling.warp(logits, as_it_is))


def residual_of_p(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "_residual", lambda p, q: p)


def bonus_from_q(monkeypatch: pytest.MonkeyPatch) -> None:
    accept = verify.accept_sampled

    def patched(keys: jax.Array, drafts: verify.Drafts, draft_ids: jax.Array, *rest: jax.Array) -> verify.Verdict:
        verdict = accept(keys, drafts, draft_ids, *rest)
        last = jnp.maximum(drafts.count - 1, 0)
        q = jnp.take_along_axis(drafts.probs, last[:, None, None], axis=1)[:, 0]
        bonus = draft_ids[jax.vmap(jax.random.categorical)(keys.judge, jnp.log(q))]
        return verdict._replace(token=jnp.where((verdict.accepted == drafts.count) & (drafts.count > 0), bonus, verdict.token))

    monkeypatch.setattr(verify, "accept_sampled", patched)


def position_off_by_one_after_the_first_round(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(config, blocks, x, start, *rest):
        return llama.forward_blocks(config, blocks, x, jnp.where(start >= max(map(len, PROMPTS)), start + 1, start), *rest)

    for module in (drafting, speculative):
        monkeypatch.setattr(module, "llama", types.SimpleNamespace(**vars(llama) | {"forward_blocks": forward}))


def accepted_where_p_is_at_least_half_of_q(monkeypatch: pytest.MonkeyPatch) -> None:
    random = types.SimpleNamespace(**vars(jax.random) | {"uniform": lambda key, shape: jnp.full(shape, 0.5)})
    monkeypatch.setattr(verify, "jax", types.SimpleNamespace(**vars(jax) | {"random": random}))


def one_more_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    leading = verify._leading
    monkeypatch.setattr(verify, "_leading", lambda accept: jnp.minimum(leading(accept) + 1, jnp.sum(accept | True, axis=1)))


def draft_ids_forgotten_in_the_residual(monkeypatch: pytest.MonkeyPatch) -> None:
    accept = verify.accept
    monkeypatch.setattr(verify, "accept", lambda keys, drafts, ids, *rest: accept(keys, drafts, jnp.arange(ids.size), *rest))


def eos_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    round_step = speculative.round_step
    monkeypatch.setattr(
        speculative, "round_step", lambda spec, state: round_step(dataclasses.replace(spec, eos_ids=spec.eos_ids[:0]), state)
    )


def looked_up_drafts_taken_for_drawn_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    accept = verify.accept
    monkeypatch.setattr(
        verify, "accept", lambda keys, drafts, *rest: accept(keys, drafts._replace(looked_up=drafts.looked_up & False), *rest)
    )


def looked_up_drafts_accepted_unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    probability = verify._leading
    monkeypatch.setattr(verify, "_leading", lambda accept: jnp.maximum(probability(accept), 1) if accept.shape[1] else probability(accept))


def rejected_lookup_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    own = verify._own_draws

    def patched(keys: verify.Keys, *rest) -> jax.Array:
        return own(keys._replace(text=jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (0, None))(keys.text, 1)), *rest)

    monkeypatch.setattr(verify, "_own_draws", patched)


def candidates_that_see_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speculative, "with_others", lambda width, others: Tree(tuple(range(-1, width + (width - 1) * others - 1))))


def others_with_the_first_ones_q(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = drafting._draw_candidates

    def patched(*args):
        first, *others = draw(*args)
        return [first, *(other._replace(probs=first.probs) for other in others)]

    monkeypatch.setattr(drafting, "_draw_candidates", patched)


def token_behind_the_draft_that_was_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    accept = verify.accept_sampled

    def patched(keys, drafts, ids, logits, settings):
        # What the target says behind another candidate is taken from behind the draft.
        width = drafts.tokens.shape[1] + 1
        behind = jnp.repeat(logits[:, 1:width], drafts.others.tokens.shape[2], axis=1)
        return accept(keys, drafts, ids, jnp.concatenate([logits[:, :width], behind], axis=1), settings)

    monkeypatch.setattr(verify, "accept_sampled", patched)


# And how sharp a branch shows them.
TREE_BUGS = [
    (candidates_that_see_each_other, 0.1),
    (others_with_the_first_ones_q, 1.0),
    (token_behind_the_draft_that_was_replaced, 0.1),
    (residual_of_p, 1.0),
]
LOOKUP_BUGS = [looked_up_drafts_taken_for_drawn_ones, looked_up_drafts_accepted_unseen, rejected_lookup_drawn_again]
LAW_BUGS = [
    wrong_q,
    argmax_drafted_softmax_as_q,
    target_unwarped,
    residual_of_p,
    bonus_from_q,
    position_off_by_one_after_the_first_round,
    accepted_where_p_is_at_least_half_of_q,
    one_more_accepted,
    draft_ids_forgotten_in_the_residual,
    eos_not_cut,
]


def test_the_argument_names_every_planted_bug():
    argument = verify.__doc__.partition("Why the text")[2].partition("All in float32")[0]
    assert set(re.findall(r"`(\w+)`", argument)) == {bug.__name__ for bug in (*LAW_BUGS, *LOOKUP_BUGS, *(bug for bug, _ in TREE_BUGS))}


@pytest.mark.slow
@pytest.mark.parametrize("bug", LAW_BUGS, ids=lambda bug: bug.__name__)
def test_a_planted_bug_breaks_the_law(params: llama.Params, exact: dict, monkeypatch: pytest.MonkeyPatch, bug):
    bug(monkeypatch)
    # Where ids are forgotten, 0, 1 and 2 are taken in their place, which should be others.
    draft_ids = [1, 3, 4] if bug is draft_ids_forgotten_in_the_residual else [0, 2, 4]
    counts = draw_texts(params, branch_of(params, draft_ids), controllers.Fixed(3))
    assert smallest_p_value(counts, exact) < BOUND / 1000


@pytest.mark.slow
@pytest.mark.parametrize(("bug", "sharpness"), TREE_BUGS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_planted_bug_in_trees_breaks_the_law(params: llama.Params, exact: dict, monkeypatch: pytest.MonkeyPatch, bug, sharpness):
    bug(monkeypatch)
    assert smallest_p_value(draw_with_candidates(params, "2, fixed:3", sharpness), exact) < BOUND / 1000


@pytest.mark.slow
@pytest.mark.parametrize("bug", LOOKUP_BUGS, ids=lambda bug: bug.__name__)
def test_a_planted_bug_in_lookup_breaks_the_law(params: llama.Params, exact: dict, monkeypatch: pytest.MonkeyPatch, bug):
    bug(monkeypatch)
    assert smallest_p_value(draw_with_lookup(params, "lookup alone, fixed"), exact) < BOUND / 1000
