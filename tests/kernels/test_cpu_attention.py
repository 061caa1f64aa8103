"""The CPU kernel for attention over the cache: right values, the same bits however tokens are cut into passes, and used where it can be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from eesd_jax.kernels.cpu import attention
from eesd_jax.model import cache as kv
from eesd_jax.model import llama, ops

pytestmark = pytest.mark.skipif(jax.default_backend() != "cpu", reason="a kernel for CPUs")


def draw(shape: tuple[int, ...], seed: int, scale: float = 1.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape, scale=scale).astype(np.float32)


def exact(q, k, v, starts, window) -> np.ndarray:
    """Float64, position by position; k and v: [B, K, P, H], the keys and values of all positions, new ones included."""
    batch, tokens, heads, _ = q.shape
    out = np.zeros(q.shape)
    for b in range(batch):
        for t in range(tokens):
            high = starts[b] + t + 1
            low = max(0, high - window) if window else 0
            for n in range(heads):
                head = n * k.shape[1] // heads
                scores = k[b, head, low:high].astype(np.float64) @ q[b, t, n]
                weights = np.exp(scores - scores.max())
                out[b, t, n] = weights / weights.sum() @ v[b, head, low:high]
    return out


def attend(q, k, v, starts, window, slots: int) -> jax.Array:
    """The kernel's answer; what stands behind the valid part of the cache is garbage."""
    batch, tokens = q.shape[:2]
    old_k, old_v = (np.full((batch, k.shape[1], slots, k.shape[3]), 1e6, np.float32) for _ in range(2))
    new_k, new_v = (np.zeros((batch, k.shape[1], tokens, k.shape[3]), np.float32) for _ in range(2))
    for b, start in enumerate(starts):
        old_k[b, :, :start], old_v[b, :, :start] = k[b, :, :start], v[b, :, :start]
        new_k[b], new_v[b] = k[b, :, start : start + tokens], v[b, :, start : start + tokens]
    arguments = (q, new_k.swapaxes(2, 3), new_v, old_k.swapaxes(2, 3), old_v, np.array(starts, np.int32))
    # A function of its own, so that nothing traced with other registers is used.
    call = jax.jit(lambda *arguments: attention.cached_attention(*arguments, ops.Visible(window=window)))
    return call(*(jnp.asarray(array) for array in arguments))


SIZES = {
    "one token": (1, 1, 9, 3, 64),
    "several rows": (3, 5, 4, 2, 16),
    "wide": (2, 17, 8, 1, 48),
    "many tokens": (1, 64, 3, 3, 32),
    "wide heads": (1, 3, 2, 1, 128),
}


@pytest.mark.parametrize("window", [None, 1, 7, 100])
@pytest.mark.parametrize(("batch", "tokens", "heads", "kv_heads", "channels"), SIZES.values(), ids=SIZES)
def test_gives_attention(registers, batch, tokens, heads, kv_heads, channels, window):
    slots = 160
    for starts in ([0, 1, 16], [96, 15, 63], [81, 33, 79]):
        starts = starts[:batch]
        q = draw((batch, tokens, heads, channels), 1, scale=channels**-0.5)
        k, v = (draw((batch, kv_heads, slots, channels), seed) for seed in (2, 3))
        found = attend(q, k, v, starts, window, slots)
        np.testing.assert_allclose(found, exact(q, k, v, starts, window), rtol=2e-5, atol=2e-6)


def test_scores_far_apart(registers):
    q = draw((1, 2, 2, 16), 1, scale=50)
    k, v = (draw((1, 1, 64, 16), seed) for seed in (2, 3))
    np.testing.assert_allclose(attend(q, k, v, [40], None, 64), exact(q, k, v, [40], None), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [None, 20])
def test_every_cut_into_passes_gives_the_same_bits(registers, window):
    q = draw((1, 24, 6, 32), 1)
    k, v = (draw((1, 2, 96, 32), seed) for seed in (2, 3))
    whole = np.asarray(attend(q, k, v, [37], window, 96))
    for tokens in (1, 2, 3, 5, 9, 17):
        for first in range(0, 24 - tokens + 1, tokens):
            part = attend(q[:, first : first + tokens], k, v, [37 + first], window, 96)
            np.testing.assert_array_equal(part, whole[:, first : first + tokens])


def test_the_row_of_a_batch_is_the_row_alone():
    q = draw((4, 3, 4, 16), 1)
    k, v = (draw((4, 2, 64, 16), seed) for seed in (2, 3))
    starts = [0, 20, 47, 60]
    together = np.asarray(attend(q, k, v, starts, None, 64))
    for b, start in enumerate(starts):
        np.testing.assert_array_equal(attend(q[b : b + 1], k[b : b + 1], v[b : b + 1], [start], None, 64)[0], together[b])


def test_no_number_hides_one_that_is_none():
    q = draw((1, 1, 2, 16), 1)
    k, v = (draw((1, 1, 32, 16), seed) for seed in (2, 3))
    k[0, 0, 5, 3] = np.nan
    assert np.isnan(attend(q, k, v, [20], None, 32)).all()
    assert np.isfinite(attend(q, k, v, [20], 4, 32)).all()


def test_other_sizes_dtypes_and_masks_are_left_to_xla():
    def accepted(q: jax.Array, cached_k: jax.Array, visible: ops.Visible = ops.Visible()) -> bool:
        return attention.accepts(q, None, None, cached_k, None, None, visible)

    q, cached = jnp.zeros((1, 1, 2, 16)), jnp.zeros((1, 1, 16, 32))
    assert accepted(q, cached) and accepted(q, cached, ops.Visible(window=4))
    assert not accepted(jnp.zeros((1, 1, 2, 12)), cached)
    assert not accepted(q, cached[..., :30])
    assert not accepted(q.astype(jnp.bfloat16), cached)
    assert not accepted(q, cached, ops.Visible(window=jnp.int32(4)))
    assert not accepted(q, cached, ops.Visible(mask=jnp.ones((1, 1), bool)))


def test_decoding_passes_use_it_and_agree_with_xla():
    config = tiny.config(head_dim=16, num_hidden_layers=1)
    params = tiny.params(config)
    cache = kv.empty(config, 2, 32, jnp.float32)
    cache = kv.KVCache(*(tuple(jnp.asarray(draw(leaf.shape, 7)) for leaf in leaves) for leaves in cache))
    x, start = jnp.asarray(draw((2, 3, config.hidden_size), 8)), jnp.array([4, 20], jnp.int32)

    def run(x: jax.Array) -> jax.Array:
        return llama.forward_blocks(config, params["blocks"], x, start, cache, range(1))[0]

    assert attention.TARGET in jax.jit(run).lower(x).as_text()
    ours = run(x)
    with ops.kernels_for(ops.PLAIN):
        assert attention.TARGET not in jax.jit(lambda x: run(x)).lower(x).as_text()
        np.testing.assert_allclose(ours, run(x), rtol=1e-5, atol=1e-5)
