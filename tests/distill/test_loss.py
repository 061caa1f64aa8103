"""Losses are what their formulas say, whatever the chunks, online and from a cache; their memory does not grow with T x V."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eesd_jax.config import LOSSES, LossConfig
from eesd_jax.distill import loss
from eesd_jax.distill.loss import TopTokens, Totals

VOCAB, SHAPE = 40, (3, 7)
DRAFT_IDS = {"whole": np.arange(VOCAB), "reduced": np.array([0, 3, 4, 11, 12, 13, 20, 28, 30, 39])}
OF_DISTRIBUTIONS = [name for name in LOSSES if name != "regression"]
MIXED = LossConfig(soft=0.5, reverse_kl=0.25, total_variation=2.0, hard=0.125)


def only(name: str) -> LossConfig:
    return LossConfig(**{"soft": 0.0, name: 1.0})


@pytest.fixture(scope="module", params=DRAFT_IDS)
def draft_ids(request) -> jax.Array:
    return jnp.array(DRAFT_IDS[request.param])


@pytest.fixture(scope="module")
def logits(draft_ids) -> tuple[np.ndarray, np.ndarray]:
    """The branch's [3, 7, Q], and the target's [3, 7, V]: peaked, so that the best token is in the draft vocabulary now and then."""
    rng = np.random.default_rng(0)
    return rng.normal(0, 2, (*SHAPE, len(draft_ids))).astype(np.float32), rng.normal(0, 4, (*SHAPE, VOCAB)).astype(np.float32)


def probabilities(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def expected(config: LossConfig, ids: np.ndarray, student: np.ndarray, teacher: np.ndarray, kept: int = VOCAB) -> Totals:
    """By the book: position by position, token by token, float64. Tokens behind the `kept` most probable ones are forgotten."""
    totals = np.zeros((len(Totals._fields), *SHAPE))
    for place in np.ndindex(SHAPE):
        q, p = probabilities(student[place]), probabilities(teacher[place])
        order = np.argsort(-p)
        best = order[0]
        value = {"soft": 0.0, "reverse_kl": 0.0, "total_variation": 1.0, "hard": 0.0}
        overlap = coverage = 0.0
        for i, token in enumerate(np.asarray(ids)):
            if token not in order[:kept]:
                continue
            value["soft"] -= p[token] * np.log(q[i])
            value["reverse_kl"] += q[i] * np.log(q[i] / p[token])
            value["total_variation"] -= min(p[token], q[i])
            overlap += min(p[token], q[i])
            coverage += p[token]
            if token == best:
                value["hard"] = -np.log(q[i])
        agreement = float(np.asarray(ids)[np.argmax(q)] == best)
        totals[(slice(None), *place)] = (sum(getattr(config, name) * v for name, v in value.items()), agreement, overlap, coverage, 1.0)
    return Totals(*totals)


def top_of(teacher: np.ndarray, kept: int) -> TopTokens:
    log_probs, ids = jax.lax.top_k(jax.nn.log_softmax(teacher), kept)
    return TopTokens(ids, log_probs)


def value_and_gradient(score, student: np.ndarray) -> tuple[Totals, jax.Array]:
    def total(student):
        totals = score(student)
        return jnp.sum(totals.loss), totals

    (_, totals), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(student)
    return totals, gradient


@pytest.mark.parametrize("config", [*(only(name) for name in OF_DISTRIBUTIONS), MIXED], ids=[*OF_DISTRIBUTIONS, "mixed"])
def test_losses_are_what_their_formulas_say_from_logits_and_from_all_tokens_kept(config, draft_ids, logits):
    student, teacher = logits
    totals, gradient = value_and_gradient(lambda x: loss.against_logits(config, draft_ids, x, teacher), student)
    wanted = expected(config, draft_ids, student, teacher)
    for name, value, right in zip(Totals._fields, totals, wanted, strict=True):
        np.testing.assert_allclose(value, right, rtol=2e-5, atol=2e-5, err_msg=name)
    everything = top_of(teacher, VOCAB)
    cached, cached_gradient = value_and_gradient(lambda x: loss.against_top_tokens(config, draft_ids, VOCAB, x, everything), student)
    for name, value, right in zip(Totals._fields, cached, totals, strict=True):
        np.testing.assert_allclose(value, right, rtol=1e-6, atol=1e-6, err_msg=name)
    np.testing.assert_allclose(cached_gradient, gradient, rtol=1e-5, atol=1e-6)
    assert np.abs(gradient).max() > 0.01


def test_the_gradient_is_the_slope(draft_ids, logits):
    student, teacher = logits
    _, gradient = value_and_gradient(lambda x: loss.against_logits(MIXED, draft_ids, x, teacher), student)
    direction = np.random.default_rng(1).normal(size=student.shape)
    ends = [expected(MIXED, draft_ids, student + shift * direction, teacher).loss.sum() for shift in (1e-5, -1e-5)]
    np.testing.assert_allclose(np.sum(gradient * direction), (ends[0] - ends[1]) / 2e-5, rtol=1e-3)


def test_of_fewer_tokens_kept_the_others_are_left_out(draft_ids, logits):
    student, teacher = logits
    config = LossConfig(soft=0.5, hard=0.25)
    totals = jax.jit(lambda x, top: loss.against_top_tokens(config, draft_ids, VOCAB, x, top))(student, top_of(teacher, 6))
    for name, value, right in zip(Totals._fields, totals, expected(config, draft_ids, student, teacher, kept=6), strict=True):
        np.testing.assert_allclose(value, right, rtol=2e-5, atol=2e-5, err_msg=name)


def test_regression_is_half_the_mean_squared_distance():
    ours, theirs = np.random.default_rng(0).normal(size=(2, *SHAPE, 16)).astype(np.float32)
    found = loss.regression(ours.astype(jnp.bfloat16), theirs)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(loss.regression(ours, theirs), 0.5 * np.mean((ours - theirs) ** 2, axis=-1), rtol=1e-5)


@functools.partial(jax.jit, static_argnums=0)
def chunked(chunk: int, mask: jax.Array, head: jax.Array, student: jax.Array, teacher: tuple) -> tuple[Totals, tuple]:
    """Sums, and the gradient in head and hidden states, of all losses at once."""
    ids = jnp.arange(VOCAB)

    def total(head, student):
        def score(head, hidden, part):
            logits, last = part
            totals = loss.against_logits(MIXED, ids, hidden @ head.T, logits)
            return totals._replace(loss=totals.loss + loss.regression(hidden, last))

        totals = loss.sum_in_chunks(score, chunk, head, student, mask, teacher)
        return totals.loss, totals

    (_, totals), gradients = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(head, student)
    return totals, gradients


def test_chunks_change_neither_loss_nor_gradient_and_masked_positions_do_not_count():
    rng = np.random.default_rng(2)
    head, student, last = (rng.normal(size=shape).astype(np.float32) for shape in ((VOCAB, 16), (*SHAPE, 16), (*SHAPE, 16)))
    teacher = rng.normal(0, 3, (*SHAPE, VOCAB)).astype(np.float32), last
    mask = rng.random(SHAPE) < 0.6
    totals, gradients = chunked(SHAPE[1], mask, head, student, teacher)
    wanted = expected(MIXED, DRAFT_IDS["whole"], student @ head.T, teacher[0])
    right = np.sum((wanted.loss + 0.5 * np.mean((student - last) ** 2, axis=-1))[mask])
    np.testing.assert_allclose(totals.loss, right, rtol=1e-5)
    assert totals.positions == mask.sum()
    assert not np.any(gradients[1][~mask])
    elsewhere = jax.tree.map(lambda leaf: np.where(mask[..., None], leaf, 1e3 * leaf), (student, teacher))
    for chunk, (one_student, one_teacher) in ((3, (student, teacher)), (3, elsewhere), (100, (student, teacher))):
        found, found_gradients = chunked(chunk, mask, head, one_student, one_teacher)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), (found, found_gradients), (totals, gradients))


@pytest.mark.parametrize("length", [1, 5, 8, 12])
def test_splitting_positions_is_undone(length):
    x = np.arange(2 * length * 3).reshape(2, length, 3)
    parts = loss.split_positions(x, 4)
    assert parts.shape == (-(-length // 4), 2, min(length, 4), 3)
    np.testing.assert_array_equal(loss.join_positions(parts, length), x)


def temporaries(length: int, vocab: int, hidden: int = 64, chunk: int = 256) -> int:
    """Bytes that value and gradient of the loss need beside arguments and results; compiled from shapes, nothing is allocated."""

    def total(head, frozen_head, mask, student, last):
        def score(head, hidden, last):
            return loss.against_logits(MIXED, ids, hidden @ head.T, last @ frozen_head.T)

        return loss.sum_in_chunks(score, chunk, head, student, mask, last).loss

    ids = jnp.arange(vocab)
    head, states = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((vocab, hidden), (1, length, hidden)))
    mask = jax.ShapeDtypeStruct((1, length), bool)
    compiled = jax.jit(jax.value_and_grad(total, argnums=(0, 3))).lower(head, head, mask, states, states).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_memory_grows_with_neither_length_nor_vocabulary_times_length():
    short, long = temporaries(2048, 131_072), temporaries(8192, 131_072)
    print(f"temporaries at V = 131072: {short / 1e6:.0f} MB at T = 2048, {long / 1e6:.0f} MB at T = 8192")
    hidden_states = (8192 - 2048) * 64 * 4
    assert long - short <= 8 * hidden_states  # 1.6 MB each; logits of the added positions would be 3,221 MB
    chunk_of_logits = 256 * 131_072 * 4
    assert long <= 8 * chunk_of_logits
