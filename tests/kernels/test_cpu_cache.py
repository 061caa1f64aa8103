"""The CPU kernels that write new entries into the cache: what they write is what XLA writes, and nothing else is touched."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from eesd_jax.kernels.cpu import cache as cpu_cache
from eesd_jax.model import cache as kv
from eesd_jax.model import ops

pytestmark = pytest.mark.skipif(jax.default_backend() != "cpu", reason="kernels for CPUs")

SLOTS, WIDTH = 48, 5


def draw(like: kv.KVCache, seed: int) -> kv.KVCache:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda array: jnp.asarray(rng.normal(size=array.shape), array.dtype), like)


def written(cache: kv.KVCache, new: kv.KVCache, start_B: jax.Array, *, held: bool) -> tuple[str, kv.KVCache]:
    """The lowered program, and what it leaves."""

    def run(cache: kv.KVCache, new: kv.KVCache, start_B: jax.Array) -> kv.KVCache:
        return kv.write(cache, kv.hold(new, WIDTH) if held else new, start_B, after=new.v[0])

    lowered = jax.jit(run).lower(cache, new, start_B)
    return lowered.as_text(), lowered.compile()(cache, new, start_B)


@pytest.mark.parametrize("held", [False, True], ids=["as they are", "held"])
@pytest.mark.parametrize("tokens", [1, 3, WIDTH])
@pytest.mark.parametrize("batch", [1, 4, 70])  # the last is shared by threads
def test_writes_what_xla_writes(batch, tokens, held):
    config = tiny.config(head_dim=16)
    cache, new = (draw(kv.empty(config, batch, slots, jnp.float32), slots) for slots in (SLOTS, tokens))
    # Also where a row begins too early or too late: as `dynamic_update_slice` has it, the nearest slot where all entries fit.
    start_B = jnp.asarray(np.resize([7, 0, SLOTS - tokens, SLOTS + 9, 20], batch), jnp.int32)
    program, ours = written(cache, new, start_B, held=held)
    assert cpu_cache.SCATTER in program
    with ops.kernels_for(ops.PLAIN):
        program, theirs = written(cache, new, start_B, held=False)
        assert cpu_cache.SCATTER not in program
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(one, other)


def test_what_is_held_leaves_a_conditional_unpadded():
    config = tiny.config()
    cache = draw(kv.empty(config, 2, SLOTS, jnp.float32), 0)
    widths = {width: draw(kv.empty(config, 2, width, jnp.float32), width) for width in (1, 2, WIDTH)}
    start_B = jnp.array([3, 11], jnp.int32)

    @jax.jit
    def run(choice: jax.Array) -> kv.KVCache:
        held = jax.lax.switch(choice, [lambda new=new: kv.hold(new, WIDTH) for new in widths.values()])
        return kv.write(cache, held, start_B, after=jnp.zeros(2))

    for choice, (width, new) in enumerate(widths.items()):
        found = run(jnp.int32(choice))
        for b, start in enumerate(start_B.tolist()):
            for layer in range(config.num_layers):
                expected_k, expected_v = np.array(cache.k[layer][b]), np.array(cache.v[layer][b])
                expected_k[:, :, start : start + width] = new.k[layer][b]
                expected_v[:, start : start + width] = new.v[layer][b]
                np.testing.assert_array_equal(found.k[layer][b], expected_k)
                np.testing.assert_array_equal(found.v[layer][b], expected_v)


def test_other_dtypes_are_written_by_xla():
    config = tiny.config()
    cache, new = (draw(kv.empty(config, 2, slots, jnp.bfloat16), slots) for slots in (SLOTS, 3))
    program, found = written(cache, new, jnp.array([4, 5], jnp.int32), held=True)
    assert cpu_cache.SCATTER not in program
    np.testing.assert_array_equal(found.v[0][1, :, 5:8], new.v[0][1])
