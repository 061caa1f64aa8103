"""The seam of the kernels: which implementation of an operation a program gets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from eesd_jax.model import ops, sharding

HERE = jax.default_backend()


@pytest.fixture
def twice():
    """An operation with a kernel for this platform that takes float32 alone, and does something else, so that it shows."""

    @ops.Operation
    def twice(x: jax.Array) -> jax.Array:
        """Doubles."""
        return 2 * x

    twice.register("nowhere", lambda x: True, lambda x: 5 * x)
    twice.register(HERE, lambda x: x.dtype == jnp.float32, lambda x: 3 * x)
    twice.register(HERE, lambda x: True, lambda x: 4 * x)
    return twice


def factor(function, x: jax.Array) -> int:
    """What a compiled program multiplies ones by."""
    return int(np.unique(jax.jit(lambda x: function(x))(x)).item())


def test_the_first_kernel_that_accepts_stands_in(twice):
    assert factor(twice, jnp.ones(8)) == 3
    assert factor(twice, jnp.ones(8, jnp.int32)) == 4
    assert factor(twice.plain, jnp.ones(8)) == 2
    assert twice.__doc__ == "Doubles."


def test_kernels_are_those_of_the_platform_that_is_compiled_for(twice):
    with ops.kernels_for("nowhere"):
        assert factor(twice, jnp.ones(8)) == 5
    for name in (ops.PLAIN, "another"):
        with ops.kernels_for(name):
            assert factor(twice, jnp.ones(8)) == 2


def test_what_the_compiler_splits_is_left_to_it(twice):
    """Nobody says that there is a mesh: the arrays do, and what is computed of them, and shapes in their place."""
    mesh = sharding.make_mesh(data=2, tensor=4)
    split = NamedSharding(mesh, PartitionSpec("tensor"))
    x = jax.device_put(jnp.ones(8), split)
    assert factor(twice, x) == 2
    assert factor(lambda x: twice(jnp.ones(8) * x), x) == 2
    assert factor(twice, jax.device_put(jnp.ones(8), NamedSharding(mesh, PartitionSpec()))) == 2
    shape = jax.ShapeDtypeStruct((8,), jnp.float32, sharding=split)
    assert jax.jit(lambda x: ops.over_devices(x)).lower(shape).compile()(x)
    one = sharding.make_mesh()
    assert factor(twice, jax.device_put(jnp.ones(8), NamedSharding(one, PartitionSpec()))) == 3


def test_what_devices_run_each_by_itself_is_not_split(twice):
    """As in self-generation: `shard_map` over `data`; only where another axis splits weights, too, is all left to the compiler."""
    for axes, expected in (({"data": 8}, 3), ({"data": 2, "tensor": 4}, 2)):
        mesh = sharding.make_mesh(**axes)
        own = PartitionSpec("data")
        each = jax.shard_map(lambda x: twice(x), mesh=mesh, in_specs=own, out_specs=own, axis_names={"data"}, check_vma=False)
        assert factor(each, jax.device_put(jnp.ones(8), NamedSharding(mesh, own))) == expected
