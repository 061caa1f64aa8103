"""Rotation makes attention depend on distances only, and each length extension does what its paper says (parity tests hold the numbers)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eesd_jax.model import rope
from eesd_jax.model.config import RopeConfig

HEAD_DIM = 32
KINDS = {
    "default": RopeConfig(),
    "linear": RopeConfig(kind="linear", factor=4.0),
    "llama3": RopeConfig(kind="llama3", factor=8.0, original_context=1024),
    "yarn": RopeConfig(kind="yarn", factor=4.0, original_context=1024, attention_factor=1.14),
    "divisors": RopeConfig(kind="divisors", divisors=tuple(np.linspace(1, 8, HEAD_DIM // 2))),
}


def rotated(config: RopeConfig, x_H: jax.Array, positions_T: jax.Array) -> jax.Array:
    x = jnp.broadcast_to(x_H, (1, len(positions_T), 1, HEAD_DIM))
    return rope.rotate(x, rope.rotation(config, HEAD_DIM, positions_T[None]))[0, :, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_scores_depend_on_distance_only(kind):
    q, k = jax.random.normal(jax.random.key(0), (2, HEAD_DIM))
    positions = jnp.array([0, 1, 5, 40, 300, 1500])
    distances = jnp.array([0, 1, 7, 33])
    for distance in distances:
        scores = jnp.sum(rotated(KINDS[kind], q, positions + distance) * rotated(KINDS[kind], k, positions), axis=-1)
        np.testing.assert_allclose(scores, scores[0], atol=3e-3)
    far = jnp.sum(rotated(KINDS[kind], q, positions) * rotated(KINDS[kind], k, positions[:1]), axis=-1)
    assert jnp.std(far) > 0.5, "other distances, other scores"


@pytest.mark.parametrize("kind", KINDS)
def test_rotation_keeps_lengths_up_to_the_attention_factor(kind):
    x = jax.random.normal(jax.random.key(1), (HEAD_DIM,))
    lengths = jnp.linalg.norm(rotated(KINDS[kind], x, jnp.arange(50)), axis=-1)
    np.testing.assert_allclose(lengths, jnp.linalg.norm(x) * KINDS[kind].attention_factor, rtol=1e-5)


@pytest.mark.parametrize("kind", ["llama3", "yarn"])
def test_extension_keeps_fast_pairs_and_slows_slow_ones_down(kind):
    ratios = rope.inverse_frequencies(RopeConfig(), HEAD_DIM) / rope.inverse_frequencies(KINDS[kind], HEAD_DIM)
    assert ratios[0] == pytest.approx(1)
    assert ratios[-1] == pytest.approx(KINDS[kind].factor)
    assert np.all(np.diff(ratios) >= 0)
    assert np.any((ratios > 1.01) & (ratios < KINDS[kind].factor - 0.01)), "some lie between"
