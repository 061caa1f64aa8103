"""Attention over a long cache by XLA: it reads a part that holds the longest row, and the result is that of the whole."""

import commands
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eesd_jax.model import ops

SLOTS, TOKENS = 40, 3
START = ([0, 1], [3, 5], [5, 4], [6, 10], [11, 2], [20, 21], [37, 40])


def attend(slots: int, start: list[int], window: int | None) -> jax.Array:
    """Of random keys and values, the first `slots` of the cache."""
    q, new_k, new_v, k, v = (
        jax.random.normal(jax.random.key(i), shape)
        for i, shape in enumerate([(2, TOKENS, 4, 8), (2, 2, 8, TOKENS), (2, 2, TOKENS, 8), (2, 2, 8, SLOTS), (2, 2, SLOTS, 8)])
    )
    with ops.kernels_for(ops.PLAIN):
        run = jax.jit(lambda *arrays: ops.cached_attention(*arrays, jnp.array(start), ops.Visible(window=window)))
        return run(q, new_k, new_v, k[..., :slots], v[:, :, :slots])


@pytest.mark.parametrize("window", [None, 4])
def test_a_part_of_the_cache_gives_what_the_whole_gives(monkeypatch, window):
    whole = [attend(SLOTS, start, window) for start in START]
    monkeypatch.setattr(ops, "_READ_AT_LEAST", 5)
    assert ops._sizes_to_read(SLOTS) == (5, 10, 20, 40)
    for start, expected in zip(START, whole, strict=True):
        np.testing.assert_allclose(attend(SLOTS, start, window), expected, rtol=1e-5, atol=1e-6)


def test_what_is_not_read_may_be_anything(monkeypatch):
    """NaN behind the part that is read would show, mask or not, as 0 times NaN is NaN."""
    monkeypatch.setattr(ops, "_READ_AT_LEAST", 5)
    shape = [(1, 1, 2, 8), (1, 1, 8, 1), (1, 1, 1, 8), (1, 1, 8, SLOTS), (1, 1, SLOTS, 8)]
    q, new_k, new_v, k, v = (jnp.ones(size) for size in shape)
    k, v = k.at[..., 10:].set(jnp.nan), v.at[:, :, 10:].set(jnp.nan)
    with ops.kernels_for(ops.PLAIN):
        run = jax.jit(lambda start: ops.cached_attention(q, new_k, new_v, k, v, start, ops.Visible()))
        assert np.isfinite(run(jnp.array([10]))).all()
        assert not np.isfinite(run(jnp.array([11]))).all()


def test_the_benchmark_measures_and_refuses():
    with commands.loaded("benchmarks/long_context.py") as command:
        small = ("--model=tiny", "--length=8", "--steps=2", "--repeats=1", "--dtype=float32")
        result = commands.run(command, *small, "--capacities=128,256")
        assert result.code == 0, result.err
        assert "256" in result.out
        commands.assert_refused(commands.run(command, *small, "--capacities=128,9"), "--capacities is '128,9'", "expected integers >= 12")
        commands.assert_refused(commands.run(command, *small, "--capacities=100000"), "expected at most", "the model's context")
