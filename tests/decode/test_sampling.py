import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from eesd_jax.decode.sampling import Sampling, probabilities, probability, sample, warp
from eesd_jax.model import ops


def settings(rows: list[tuple[float, int, float, float]]) -> Sampling:
    temperature, top_k, top_p, min_p = zip(*rows, strict=True)
    return Sampling(
        jnp.array(temperature, jnp.float32), jnp.array(top_k, jnp.int32), jnp.array(top_p, jnp.float32), jnp.array(min_p, jnp.float32)
    )


ROWS = [
    (0.0, 0, 1.0, 0.0),
    (1.0, 0, 1.0, 0.0),
    (0.5, 0, 1.0, 0.0),
    (1.0, 1, 1.0, 0.0),
    (0.7, 5, 1.0, 0.0),
    (1.0, 1000, 1.0, 0.0),
    (1.0, 0, 0.9, 0.0),
    (1.5, 0, 1e-6, 0.0),
    (1.0, 0, 1.0, 0.2),
    (0.8, 20, 0.8, 0.05),
    (1e-4, 0, 0.9, 0.0),
]


def warped(logits: jax.Array, sampling: Sampling) -> jax.Array:
    return probabilities(logits, warp(logits, sampling))


def test_warp_is_what_sorting_gives():
    logits = np.random.default_rng(0).normal(size=(len(ROWS), 200)).astype(np.float32) * 3
    got = jax.jit(warped)(jnp.asarray(logits), settings(ROWS))
    want = np.stack([reference.warped(row, *setting) for row, setting in zip(logits, ROWS, strict=True)])
    np.testing.assert_allclose(got, want, atol=1e-6)
    np.testing.assert_array_equal(np.asarray(got) > 0, want > 1e-30)


def test_the_probability_of_a_token_is_that_of_the_distribution_written_down():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(len(ROWS), 3, 40)), jnp.float32)
    of_positions = Sampling(*(setting[:, None] for setting in settings(ROWS)))
    in_few = warp(logits, of_positions)
    everywhere = jnp.broadcast_to(jnp.arange(40)[:, None, None], (40, len(ROWS), 3))
    alone = jax.vmap(lambda token: probability(logits, in_few, token))(everywhere)
    np.testing.assert_allclose(jnp.moveaxis(alone, 0, -1), probabilities(logits, in_few), rtol=1e-6)


def test_a_row_does_not_depend_on_the_settings_of_the_others():
    logits = jnp.asarray(np.random.default_rng(1).normal(size=(len(ROWS), 50)), jnp.float32)
    keys = jax.random.split(jax.random.key(3), len(ROWS))
    together = sample(keys, logits, settings(ROWS))
    for i, row in enumerate(ROWS):
        alone = sample(keys[i : i + 1], logits[i : i + 1], settings([row]))
        assert alone.token[0] == together.token[i]
        np.testing.assert_array_equal(alone.probs[0], together.probs[i])


def test_tokens_follow_the_distribution_that_is_returned():
    draws = 20_000
    logits = jnp.asarray([2.0, 1.0, 0.5, 0.0, -1.0, -3.0])
    for row in [(1.0, 0, 1.0, 0.0), (0.7, 4, 0.95, 0.0)]:
        keys = jax.random.split(jax.random.key(7), draws)
        repeated = settings([row] * draws)
        draw = jax.jit(sample)(keys, jnp.tile(logits, (draws, 1)), repeated)
        expected = np.asarray(draw.probs[0], np.float64) * draws
        counts = np.bincount(draw.token, minlength=6)
        assert counts[expected == 0].sum() == 0
        live = expected > 0
        chi_square = np.sum((counts[live] - expected[live]) ** 2 / expected[live])
        assert chi_square < 30  # 5 degrees of freedom at most: p < 2e-5 by chance


def test_ties_are_kept_together_and_greedy_takes_the_first():
    logits = jnp.array([[1.0, 3.0, 3.0, 3.0, 0.0]])
    probs = warped(logits, settings([(1.0, 2, 1.0, 0.0)]))
    np.testing.assert_allclose(probs[0], [0, 1 / 3, 1 / 3, 1 / 3, 0], atol=1e-6)
    assert sample(jax.random.split(jax.random.key(0), 1), logits, settings([(0.0, 0, 1.0, 0.0)])).token[0] == 1


@pytest.mark.parametrize("row", [(1e-6, 0, 1.0, 0.0), (1.0, 0, 1.0, 0.0), (1e6, 3, 0.5, 0.1)])
def test_extreme_logits_stay_finite(row: tuple[float, int, float, float]):
    probs = warped(jnp.array([[-1e30, 0.0, 1e4, 1e4 - 1]]), settings([row]))
    assert np.isfinite(probs).all()
    np.testing.assert_allclose(probs.sum(), 1, atol=1e-6)


@pytest.mark.parametrize("vocabulary", [64, 640, 300])
def test_the_best_token_is_the_first_of_the_best(vocabulary):
    rng = np.random.default_rng(0)
    # Few different values: many ties, within groups of tokens and between them.
    logits = rng.integers(0, 4, (50, 3, vocabulary)).astype(np.float32)
    logits[0], logits[1] = -np.inf, 2.0
    found = jax.jit(ops.argmax)(logits)
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, np.argmax(logits, axis=-1))
    one_best = np.eye(vocabulary, dtype=np.float32)
    np.testing.assert_array_equal(jax.jit(ops.argmax)(one_best), np.arange(vocabulary))
