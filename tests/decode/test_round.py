"""The invariants of a round of speculation, on the real jitted path; and planted bugs that change no text but waste or miscount."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from eesd_jax import DecodeConfig, Engine, SamplingConfig
from eesd_jax.config import DraftConfig
from eesd_jax.decode import loop
from eesd_jax.decode import round as speculative
from eesd_jax.decode.controllers import Beta, Calibration, Controller, Fixed
from eesd_jax.decode.state import RUNNING, DecodeState
from eesd_jax.engine import engine
from eesd_jax.engine.drafter import Drafter
from eesd_jax.model import cache as kv
from eesd_jax.model import exit_branch

PROMPTS = [[5, 9, 200, 31], [7], [11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23], [250, 3]]
BUDGET = 20
OPTIONS = DecodeConfig(max_new_tokens=BUDGET, prompt_buckets=(16,), min_capacity=32, stream_chunk=3)
BETA = Beta(prior_alpha=4.0, prior_beta=1.0, discount=0.9, idle_discount=1.0)
MODEL = functools.cache(lambda: tiny.loaded_model()._replace(eos_ids=()))


def make_engine(
    exit_layer: int,
    start: str,
    eos_ids: tuple[int, ...] = (),
    widths: tuple[int, ...] = (2,),
    max_draft: int = 3,
    *,
    deep_input: bool = False,
    candidates: int = 1,
) -> Engine:
    model = MODEL()
    branch = exit_branch.init_exit_branch(model.config, model.params, exit_layer, start, deep_input=deep_input)
    drafter = Drafter(branch, DraftConfig(exit_layer, max_draft, widths, candidates=candidates), Calibration(), trained=False)
    return Engine(model._replace(eos_ids=eos_ids), OPTIONS, drafter)


@pytest.fixture(scope="module")
def lm() -> Engine:
    """Exit behind the second of three blocks: some drafts are accepted, some are not."""
    return make_engine(2, "zero")


@pytest.fixture(scope="module")
def perfect() -> Engine:
    """A draft that is the target: blocks 1..L-1, and a branch that is block L, norm and head."""
    return make_engine(2, "last")


@pytest.fixture(scope="module")
def deep() -> Engine:
    """A branch on the embedding and on the target's last hidden state of the token before."""
    return make_engine(0, "next", deep_input=True)


@pytest.fixture(scope="module")
def plain_tokens(lm: Engine) -> list[list[int]]:
    return [generation.token_ids for generation in lm.generate_ids(PROMPTS, seeds=[0] * 4, controller=None)]


def states(lm: Engine, controller: Controller, rounds: int, sampling: SamplingConfig = SamplingConfig()) -> list[DecodeState]:
    """The states after each of the first rounds, copied before the next one uses them up."""
    state = lm.prefill(PROMPTS, [1, 2, 3, 4], len(PROMPTS), BUDGET, controller)
    out = []
    for _ in range(rounds):
        state = lm.decode(state, sampling, controller, 1)
        out.append(jax.tree.map(lambda leaf: leaf.copy(), state))
    return out


def assert_caches_hold_the_committed_tokens(lm: Engine, state: DecodeState) -> None:
    """Keys and values of the first length - 1 tokens, in every block and in the exit block, are those of a fresh pass over them.

    And so is what a branch with a second input begins its next draft with.
    """
    config, drafter = lm.model.config, lm.drafter
    capacity = state.tokens.shape[1]
    fresh, exits = jax.jit(loop.prefill, static_argnums=0, static_argnames=("exit_layer", "capacity", "chunk"))(
        config, lm.model.params, drafter.branch, state.tokens, state.length, state.limit, state.row_keys,
        exit_layer=drafter.draft.exit_layer, capacity=capacity, chunk=capacity,
    )  # fmt: skip
    pairs = zip(jax.tree.leaves((state.cache, state.draft.exit_cache)), jax.tree.leaves((fresh.cache, exits.exit_cache)), strict=True)
    for held, expected in pairs:
        slots = held.shape.index(capacity)
        for row, length in enumerate(np.asarray(state.length)):
            valid = [np.take(np.asarray(leaf[row]), np.arange(length - 1), axis=slots - 1) for leaf in (held, expected)]
            np.testing.assert_allclose(*valid, atol=2e-5)
    assert (exits.deep is None) == (drafter.branch.fusion is None)
    if exits.deep is not None:
        running = np.asarray(state.finish) == RUNNING
        np.testing.assert_allclose(state.draft.deep[running], exits.deep[running], atol=2e-5)


def replay(controller: Beta, state: DecodeState) -> tuple[np.ndarray, np.ndarray]:
    """Posterior of each row from its log alone: drafts behind the end of a text count neither way."""
    log = jax.device_get(state.draft.log)
    alpha, beta = [], []
    for row, rounds in enumerate(log.rounds):
        a, b = controller.prior_alpha, controller.prior_beta
        for drafted, accepted, committed in zip(*(field[row, :rounds] for field in log[1:4]), strict=True):
            tested = accepted if committed <= accepted else drafted
            if tested:
                a = controller.prior_alpha + controller.discount * (a - controller.prior_alpha)
                b = controller.prior_beta + controller.discount * (b - controller.prior_beta)
            a, b = a + accepted, b + min(tested - accepted, 1)
        alpha.append(a)
        beta.append(b)
    return np.array(alpha), np.array(beta)


def assert_counts_agree(state: DecodeState, controller: Beta) -> None:
    log = jax.device_get(state.draft.log)
    alpha, beta = replay(controller, state)
    np.testing.assert_allclose(state.draft.controller.alpha, alpha, rtol=1e-5)
    np.testing.assert_allclose(state.draft.controller.beta, beta, rtol=1e-5)
    for row, rounds in enumerate(log.rounds):
        committed, accepted, drafted = (field[row, :rounds] for field in (log.committed, log.accepted, log.drafted))
        starts = len(PROMPTS[row]) + np.cumsum(committed) - committed
        assert committed.sum() == state.length[row] - len(PROMPTS[row])
        assert (accepted <= drafted).all()
        assert (accepted <= committed).all()
        # A sampled draft is never thrown away unverified: none is drafted that the budget could not hold.
        assert (drafted <= np.asarray(state.limit)[row] - starts - 1).all()


def test_caches_stay_in_place(lm: Engine):
    state, settings = lm.prefill(PROMPTS, [0] * 4, 4, BUDGET, BETA), engine._sampling_arrays(SamplingConfig(), 4, None)
    lowered = engine._decode_speculative.lower(lm.speculation(BETA, settings), state, np.int32(1))
    program = lowered.as_text(debug_info=True)
    for part in ("draft", "draft/while/body/exit_branch", "verify", "accept", "commit", "learn"):
        assert f"/{part}/" in program, part  # so profiles name the steps of a round
    caches = jax.tree.leaves((state.cache, state.draft.exit_cache))
    shapes = {str(list(leaf.shape)).replace(" ", "") for leaf in caches}
    program = lowered.compile()
    assert not shapes & set(re.findall(r"= f32(\[[\d,]+\])\S* copy(?:-start)?\(", program.as_text()))
    assert program.memory_analysis().alias_size_in_bytes >= sum(leaf.nbytes for leaf in caches)


@pytest.mark.parametrize("sampling", [SamplingConfig(), SamplingConfig(temperature=1.0)], ids=["greedy", "sampled"])
def test_invariants_hold_after_every_round(lm: Engine, sampling: SamplingConfig):
    for state in states(lm, BETA, 8, sampling):
        assert_caches_hold_the_committed_tokens(lm, state)
        assert_counts_agree(state, BETA)


def test_nothing_is_read_of_the_distributions_of_rounds_before(lm: Engine):
    texts = []
    for before in (0.0, 0.7):
        state = lm.prefill(PROMPTS, [1, 2, 3, 4], len(PROMPTS), BUDGET, BETA)
        state = state._replace(draft=state.draft._replace(probs=state.draft.probs + before))
        texts.append(lm.decode(state, SamplingConfig(temperature=1.0), BETA, 2 * BUDGET).tokens)
    np.testing.assert_array_equal(*texts)


def test_invariants_hold_with_a_second_input(deep: Engine, plain_tokens: list[list[int]]):
    for state in states(deep, BETA, 8, SamplingConfig(temperature=1.0)):
        assert_caches_hold_the_committed_tokens(deep, state)
        assert_counts_agree(state, BETA)
    for controller in (Fixed(3), BETA):
        together = deep.generate_ids(PROMPTS, seeds=[0] * 4, controller=controller)
        assert [generation.token_ids for generation in together] == plain_tokens


def replacements(state: DecodeState) -> int:
    """Rounds in which another candidate stood in for the rejected draft."""
    log = state.draft.log
    return int(np.sum((log.committed > log.accepted + 1) & (np.arange(log.committed.shape[1]) < log.rounds[:, None])))


@pytest.mark.parametrize("deep_input", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["one input", "two inputs"])
def test_invariants_hold_with_several_candidates(deep_input: bool, plain_tokens: list[list[int]]):
    tree = make_engine(*((0, "next") if deep_input else (2, "zero")), deep_input=deep_input, candidates=3)
    for sampling in (SamplingConfig(), SamplingConfig(temperature=1.0)):
        for state in (after := states(tree, BETA, 8, sampling)):
            assert_caches_hold_the_committed_tokens(tree, state)
            assert_counts_agree(state, BETA)
        assert replacements(after[-1]) > 0
    for controller in (Fixed(3), BETA):
        together = tree.generate_ids(PROMPTS, seeds=[0] * 4, controller=controller)
        assert [generation.token_ids for generation in together] == plain_tokens


def test_other_candidates_save_rounds(lm: Engine):
    alone, among_three = (
        sum(generation.rounds for generation in engine.generate_ids(PROMPTS, seeds=[0] * 4, controller=Fixed(1)))
        for engine in (lm, make_engine(2, "zero", candidates=3))
    )
    assert among_three < alone


def test_with_one_candidate_nothing_is_kept_of_others(lm: Engine):
    assert replacements(states(lm, BETA, 8)[-1]) == 0


def test_a_long_prompt_in_chunks_gives_the_second_input_of_a_short_one(deep: Engine):
    """Whatever chunk its end lies in, also where it is the first of one."""
    config, params, branch = deep.model.config, deep.model.params, deep.drafter.branch
    tokens = jnp.arange(1, 25).reshape(1, 24) * jnp.ones((8, 1), jnp.int32)
    lengths = jnp.array([1, 2, 7, 8, 9, 16, 17, 24])
    keys = jax.vmap(jax.random.key)(jnp.arange(8))
    run = jax.jit(loop.prefill, static_argnums=0, static_argnames=("exit_layer", "capacity", "chunk"))
    whole, parts = (
        run(config, params, branch, tokens, lengths, lengths + 1, keys, exit_layer=0, capacity=32, chunk=chunk)[1] for chunk in (24, 8)
    )
    np.testing.assert_allclose(whole.deep, parts.deep, atol=1e-5)
    np.testing.assert_array_equal(whole.deep[0], 0)
    for held, expected in zip(jax.tree.leaves(parts.exit_cache), jax.tree.leaves(whole.exit_cache), strict=True):
        slots = held.shape.index(32)
        np.testing.assert_allclose(*(np.take(np.asarray(leaf), np.arange(24), axis=slots) for leaf in (held, expected)), atol=1e-5)


def test_a_perfect_draft_is_always_accepted(perfect: Engine, plain_tokens: list[list[int]]):
    for generation, tokens in zip(perfect.generate_ids(PROMPTS, seeds=[0] * 4, controller=Fixed(3)), plain_tokens, strict=True):
        assert generation.token_ids == tokens
        assert generation.accepted == generation.drafted
        assert (generation.log.committed[:-1] == 4).all()
        assert generation.rounds == BUDGET / 4
        np.testing.assert_array_equal(generation.log.acceptance_by_position(), [1, 1, 1])


def test_caches_are_complete_behind_full_acceptance(perfect: Engine):
    for state in states(perfect, Fixed(3), 3):
        assert (np.asarray(state.draft.log.accepted[:, 0]) == 3).all()
        assert_caches_hold_the_committed_tokens(perfect, state)


@pytest.mark.parametrize("controller", [Fixed(0), Fixed(3), BETA], ids=str)
def test_greedy_tokens_are_those_of_plain_decoding_in_any_batch(lm: Engine, plain_tokens: list[list[int]], controller: Controller):
    together = lm.generate_ids(PROMPTS, seeds=[0] * 4, controller=controller)
    assert [generation.token_ids for generation in together] == plain_tokens
    backwards = lm.generate_ids(PROMPTS[::-1], seeds=[0] * 4, controller=controller, batch_size=4)
    assert [generation.token_ids for generation in backwards] == plain_tokens[::-1]


def test_eos_inside_a_round_ends_the_row_and_counts_stop_there(plain_tokens: list[list[int]]):
    for position in (0, 1, 2, 5, 6, 7):
        eos = plain_tokens[0][position]
        ended = make_engine(2, "last", eos_ids=(eos, 319))
        for generation, tokens in zip(ended.generate_ids(PROMPTS, seeds=[0] * 4, controller=BETA), plain_tokens, strict=True):
            expected = tokens[: tokens.index(eos) + 1] if eos in tokens else tokens
            assert generation.token_ids == expected
            assert generation.finish_reason == ("eos" if eos in tokens else "length")
            assert generation.log.committed.sum() == len(expected)
            assert generation.accepted == generation.drafted  # of the drafts that the text did not end before


def test_rounds_in_chunks_are_the_same_rounds(lm: Engine):
    sampling = SamplingConfig(temperature=0.8)
    whole = lm.generate_ids(PROMPTS[:1], seeds=[3], controller=BETA, sampling=sampling)[0]
    chunks = lm.generate_ids(PROMPTS[:1], seeds=[3], controller=BETA, sampling=sampling, stop=["zzzz"])[0]
    assert whole.token_ids == chunks.token_ids
    np.testing.assert_array_equal(whole.log.drafted, chunks.log.drafted)


def test_stop_strings_discard_what_overshot(perfect: Engine):
    free = perfect.generate_ids(PROMPTS[:1], seeds=[0], controller=Fixed(3))[0]
    stop = free.text[3:5]
    cut = perfect.generate_ids(PROMPTS[:1], seeds=[0], controller=Fixed(3), stop=[stop])[0]
    assert cut.text == free.text[: free.text.index(stop)]
    assert cut.log.committed.sum() == len(cut.token_ids)
    assert cut.rounds == -(-len(cut.token_ids) // 4)


def test_new_prompts_and_settings_do_not_compile(lm: Engine):
    lm.generate_ids(PROMPTS[:2], seeds=[0, 0], controller=BETA)
    compiled = engine._decode_speculative._cache_size(), engine._prefill._cache_size()
    lm.generate_ids([[8, 9, 10], [4]], seeds=[5, 6], controller=BETA, sampling=SamplingConfig(temperature=0.7, top_p=0.9), max_new_tokens=9)
    assert (engine._decode_speculative._cache_size(), engine._prefill._cache_size()) == compiled


# Planted bugs that change no text: the invariants above must see them.


@pytest.fixture
def fresh_programs():
    """What is compiled under a planted bug is neither taken from other tests nor left to them."""
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.slow
def test_a_stale_exit_cache_is_seen(perfect: Engine, monkeypatch: pytest.MonkeyPatch, fresh_programs):
    run_exit_block = exit_branch.run_exit_block

    def patched(config, branch, h, start, cache, *tree):
        output, new = run_exit_block(config, branch, h, start, cache, *tree)
        if cache is None:  # In verification the last position is forgotten, as by a branch that keeps only what it ran on itself.
            new = kv.KVCache((new.k[0].at[..., -1].set(0),), (new.v[0].at[:, :, -1].set(0),))
        return output, new

    monkeypatch.setattr(exit_branch, "run_exit_block", patched)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        for state in states(perfect, Fixed(3), 2):
            assert_caches_hold_the_committed_tokens(perfect, state)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["late", "early"])
def test_a_candidate_whose_entries_stay_where_they_were_is_seen(where: str, monkeypatch: pytest.MonkeyPatch, fresh_programs):
    if where == "late":
        monkeypatch.setattr(
            speculative, "_slots_of_text", lambda verdict, width: jnp.zeros_like(verdict.other)[:, None] + jnp.arange(width)
        )
    else:
        take = kv.take
        monkeypatch.setattr(kv, "take", lambda entries, slots: take(entries, 0 * slots if slots.shape[1] == 1 else slots))
    tree = make_engine(2, "zero", candidates=3)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        for state in states(tree, Fixed(3), 8):
            assert_caches_hold_the_committed_tokens(tree, state)


@pytest.mark.slow
def test_an_update_before_truncation_is_seen(plain_tokens: list[list[int]], monkeypatch: pytest.MonkeyPatch, fresh_programs):
    ended = make_engine(2, "last", eos_ids=tuple(tokens[0] for tokens in plain_tokens))  # every text ends with its first token
    assert_counts_agree(states(ended, BETA, 2)[-1], BETA)
    jax.clear_caches()
    # What verification accepted, whether or not the text ended before it.
    monkeypatch.setattr(speculative, "_tested_and_kept", lambda drafted, accepted, committed: (drafted, accepted))
    with pytest.raises(AssertionError):
        assert_counts_agree(states(ended, BETA, 2)[-1], BETA)


@pytest.mark.slow
def test_a_discarded_draft_is_seen(lm: Engine, monkeypatch: pytest.MonkeyPatch, fresh_programs):
    round_step = speculative.round_step

    def patched(spec, state):
        # Drafts as if the budget were longer than it is, and commits what fits.
        after = round_step(spec, state._replace(limit=state.limit + 2))
        length = jnp.minimum(after.length, state.limit)
        finish = jnp.where(length >= state.limit, speculative.LENGTH, after.finish)
        return after._replace(limit=state.limit, length=length, finish=finish)

    monkeypatch.setattr(speculative, "round_step", patched)
    with pytest.raises(AssertionError):
        for state in states(lm, BETA, 20):
            assert_counts_agree(state, BETA)


@pytest.mark.slow
def test_a_neighbours_length_is_seen(lm: Engine, monkeypatch: pytest.MonkeyPatch, fresh_programs):
    write = kv.write
    monkeypatch.setattr(kv, "write", lambda cache, new, start, after: write(cache, new, jnp.roll(start, 1), after))
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        for state in states(lm, BETA, 2):
            assert_caches_hold_the_committed_tokens(lm, state)
