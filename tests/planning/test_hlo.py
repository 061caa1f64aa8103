"""Costs that are read from compiled programs, as XLA for CPU writes them and as libtpu does. On eight virtual CPU devices."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from eesd_jax.model import sharding
from eesd_jax.planning import hlo


def mesh_of_eight() -> jax.sharding.Mesh:
    return sharding.make_mesh(fsdp=8)


def shape_of(shape: tuple[int, ...], *axes: str | None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh_of_eight(), PartitionSpec(*axes)))


def cost_of(function, *arguments, open_trips=(1,), **options) -> hlo.Cost:
    return hlo.cost(jax.jit(function, **options).lower(*arguments).compile().as_text(), open_trips)


def everywhere() -> NamedSharding:
    return NamedSharding(mesh_of_eight(), PartitionSpec())


def test_matrix_products_are_counted_as_often_as_a_loop_runs():
    x, w = jnp.ones((64, 32)), jnp.ones((5, 32, 32))

    def run(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    once = cost_of(lambda x, w: jnp.tanh(x @ w), x, w[0])
    cost = cost_of(run, x, w)
    assert once.flops == 2 * 64 * 32 * 32
    assert cost.flops == 5 * once.flops
    assert cost.open_loops == 0
    # Each weight is read once, the state is read and written each time.
    assert 4 * (5 * 32 * 32 + 5 * 2 * 64 * 32) <= cost.bytes < 3 * 4 * (5 * 32 * 32 + 5 * 2 * 64 * 32)


def test_a_loop_that_data_end_is_counted_as_often_as_one_says():
    def run(x, w):
        return jax.lax.while_loop(lambda x: jnp.sum(x) < 1e6, lambda x: jnp.tanh(x @ w), x)

    x, w = jnp.ones((64, 32)), jnp.ones((32, 32))
    once, three = cost_of(run, x, w), cost_of(run, x, w, open_trips=(3,))
    assert (once.open_loops, three.open_loops) == (1, 1)
    assert once.flops == 2 * 64 * 32 * 32
    assert three.flops == 3 * once.flops


def test_what_an_all_gather_sends():
    """Every chip sends its eighth to the seven others."""
    cost = cost_of(lambda w: w, shape_of((1024, 64), "fsdp"), out_shardings=everywhere())
    assert cost.collectives == {"all-gather": 7 * 1024 * 64 * 4 / 8}


def test_what_an_all_reduce_sends_in_a_loop():
    """A product whose contracted axis is split leaves every chip a summand of all of it: 2 (n - 1) / n of its size, every time."""

    def run(x, w):
        return jax.lax.scan(lambda total, _: (total + jnp.tanh(x * total[0, 0]) @ w, None), jnp.zeros((16, 24)), None, length=3)[0]

    cost = cost_of(run, shape_of((16, 64), None, "fsdp"), shape_of((64, 24), "fsdp"), out_shardings=everywhere())
    assert cost.collectives == {"all-reduce": 3 * 2 * 7 / 8 * 16 * 24 * 4}


def test_of_a_conditional_the_chosen_branch_is_counted():
    def run(choice, x):
        widths = [lambda x, i=i: jnp.sum(jnp.tanh(x[:i] @ x.T)) for i in (2, 4, 8)]
        return jax.lax.switch(choice, widths, x)

    module = hlo.Module(jax.jit(run).lower(jnp.int32(0), jnp.ones((8, 8))).compile().as_text())
    assert [module.run(chosen={3: i}).flops for i in range(3)] == [2 * width * 8 * 8 for width in (2, 4, 8)]
    assert module.run() == module.run(chosen={2: 0})


# As libtpu writes it: a loop over i = 0, 2, 4, 6 whose counter is copied, a product as a convolution over a window of which one place falls
# on data, chips of a collective as axes of a mesh, one collective in two fusions, memory space 1 (on the chip), and a slice of an array.
TPU_TEXT = """
HloModule jit_f, is_scheduled=true

%gather.1 (p.1: bf16[4,8]) -> bf16[16,8] {
  %p.1 = bf16[4,8]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  ROOT %all-gather.1 = bf16[16,8]{1,0:T(8,128)(2,1)S(1)} all-gather(%p.1), channel_id=7, replica_groups=mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_0'}
}

%gather.2 (p.2: bf16[4,8]) -> bf16[16,8] {
  %p.2 = bf16[4,8]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  ROOT %all-gather.2 = bf16[16,8]{1,0:T(8,128)(2,1)S(1)} all-gather(%p.2), channel_id=7, replica_groups=mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_0'}
}

%slice.1 (p.3: bf16[40,4,8], p.4: s32[]) -> bf16[1,4,8] {
  %p.3 = bf16[40,4,8]{2,1,0:T(8,128)(2,1)} parameter(0)
  %p.4 = s32[]{:T(128)S(6)} parameter(1)
  ROOT %ds = bf16[1,4,8]{2,1,0:T(8,128)(2,1)S(1)} dynamic-slice(%p.3, %p.4, %p.4, %p.4), dynamic_slice_sizes={1,4,8}
}

%body (arg.1: (s32[], bf16[40,4,8], bf16[4,8])) -> (s32[], bf16[40,4,8], bf16[4,8]) {
  %arg.1 = (s32[]{:T(128)}, bf16[40,4,8]{2,1,0:T(8,128)(2,1)}, /*index=2*/bf16[4,8]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%arg.1), index=0
  %copy.1 = s32[]{:T(128)S(6)} copy(%i.1)
  %two = s32[]{:T(128)S(6)} constant(2)
  %next = s32[]{:T(128)S(6)} add(%copy.1, %two)
  %stack = bf16[40,4,8]{2,1,0:T(8,128)(2,1)} get-tuple-element(%arg.1), index=1
  %mine = bf16[4,8]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%arg.1), index=2
  %fusion.1 = bf16[1,4,8]{2,1,0:T(8,128)(2,1)S(1)} fusion(%stack, %copy.1), kind=kLoop, calls=%slice.1
  %fusion.2 = bf16[16,8]{1,0:T(8,128)(2,1)S(1)} fusion(%mine), kind=kCustom, calls=%gather.1
  %fusion.3 = bf16[16,8]{1,0:T(8,128)(2,1)S(1)} fusion(%mine), kind=kCustom, calls=%gather.2
  %left = bf16[2,2048,320,1]{1,2,3,0:T(8,128)(2,1)S(1)} custom-call(), custom_call_target="AllocateBuffer"
  %right = bf16[40,128,320,1]{1,2,0,3:T(8,128)(2,1)S(1)} custom-call(), custom_call_target="AllocateBuffer"
  %out = bf16[2,2048,40,128]{3,1,2,0:T(8,128)(2,1)S(1)} convolution(%left, %right), window={size=1x40 pad=0_0x39_39 rhs_reversal=0x1}, dim_labels=0bf1_1oi0->0b1f
  ROOT %tuple.1 = (s32[]{:T(128)}, bf16[40,4,8]{2,1,0:T(8,128)(2,1)}, bf16[4,8]{1,0:T(8,128)(2,1)S(1)}) tuple(%next, %stack, %mine)
}

%condition (arg.2: (s32[], bf16[40,4,8], bf16[4,8])) -> pred[] {
  %arg.2 = (s32[]{:T(128)}, bf16[40,4,8]{2,1,0:T(8,128)(2,1)}, bf16[4,8]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %i.2 = s32[]{:T(128)} get-tuple-element(%arg.2), index=0
  %limit = s32[]{:T(128)} constant(8)
  ROOT %less = pred[]{:T(512)} compare(%i.2, %limit), direction=LT
}

ENTRY %main (p.5: bf16[40,4,8], p.6: bf16[4,8]) -> bf16[4,8] {
  %p.5 = bf16[40,4,8]{2,1,0:T(8,128)(2,1)} parameter(0)
  %p.6 = bf16[4,8]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %copy.2 = s32[]{:T(128)S(6)} copy(%zero)
  %tuple.2 = (s32[]{:T(128)}, bf16[40,4,8]{2,1,0:T(8,128)(2,1)}, bf16[4,8]{1,0:T(8,128)(2,1)S(1)}) tuple(%copy.2, %p.5, %p.6)
  %while.1 = (s32[]{:T(128)}, bf16[40,4,8]{2,1,0:T(8,128)(2,1)}, bf16[4,8]{1,0:T(8,128)(2,1)S(1)}) while(%tuple.2), condition=%condition, body=%body
  ROOT %result = bf16[4,8]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%while.1), index=2
}
"""  # noqa: E501


def test_what_libtpu_writes():
    cost = hlo.cost(TPU_TEXT)
    assert cost.open_loops == 0
    assert cost.flops == 4 * 2 * (2 * 2048) * (40 * 128) * 320
    assert cost.collectives == {"all-gather": 4 * 3 * 4 * 8 * 2}
    # The first constant; then, each time, a slice of the stack, the counter, and what the condition looks at and says.
    assert cost.bytes == 4 + 4 * (4 * 8 * 2 + 4 + (4 + 4 + 1))


# An all-gather that runs beside a product, as libtpu writes it: the array that it fills goes through both fusions, which do not touch it.
ASYNC_TEXT = """
HloModule jit_f, is_scheduled=true

%beside (p.1: bf16[4,8], p.2: bf16[16,8], p.3: bf16[32,8]) -> (bf16[32,8], bf16[4,8], bf16[16,8], bf16[16,8]) {
  %p.1 = bf16[4,8]{1,0:T(8,128)(2,1)} parameter(0)
  %p.2 = bf16[16,8]{1,0:T(8,128)(2,1)} parameter(1)
  %p.3 = bf16[32,8]{1,0:T(8,128)(2,1)} parameter(2)
  %neg = bf16[32,8]{1,0:T(8,128)(2,1)} negate(%p.3)
  %all-gather.1 = bf16[16,8]{1,0:T(8,128)(2,1)} all-gather(%p.1), channel_id=3, replica_groups={{0,1,2,3}}, dimensions={0}
  ROOT %tuple.1 = (bf16[32,8]{1,0:T(8,128)(2,1)}, bf16[4,8]{1,0:T(8,128)(2,1)}, bf16[16,8]{1,0:T(8,128)(2,1)}, bf16[16,8]{1,0:T(8,128)(2,1)}) tuple(%neg, %p.1, %p.2, %all-gather.1)
}

%done (p.4: bf16[4,8], p.5: bf16[16,8]) -> bf16[16,8] {
  %p.4 = bf16[4,8]{1,0:T(8,128)(2,1)} parameter(0)
  %p.5 = bf16[16,8]{1,0:T(8,128)(2,1)} parameter(1)
  %all-gather.2 = bf16[16,8]{1,0:T(8,128)(2,1)} all-gather(%p.4), channel_id=3, replica_groups={{0,1,2,3}}, dimensions={0}
  ROOT %call = bf16[16,8]{1,0:T(8,128)(2,1)} custom-call(%p.4, %p.5, %all-gather.2), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (p.6: bf16[4,8], p.7: bf16[16,8], p.8: bf16[32,8]) -> bf16[16,8] {
  %p.6 = bf16[4,8]{1,0:T(8,128)(2,1)} parameter(0)
  %p.7 = bf16[16,8]{1,0:T(8,128)(2,1)} parameter(1)
  %p.8 = bf16[32,8]{1,0:T(8,128)(2,1)} parameter(2)
  %fusion.1 = (bf16[32,8]{1,0:T(8,128)(2,1)}, bf16[4,8]{1,0:T(8,128)(2,1)}, bf16[16,8]{1,0:T(8,128)(2,1)}, bf16[16,8]{1,0:T(8,128)(2,1)}) fusion(%p.6, %p.7, %p.8), kind=kOutput, calls=%beside
  %get.1 = bf16[4,8]{1,0:T(8,128)(2,1)} get-tuple-element(%fusion.1), index=1
  %get.2 = bf16[16,8]{1,0:T(8,128)(2,1)} get-tuple-element(%fusion.1), index=2
  ROOT %fusion.2 = bf16[16,8]{1,0:T(8,128)(2,1)} fusion(%get.1, %get.2), kind=kCustom, calls=%done
}
"""  # noqa: E501


def test_a_collective_beside_a_product_moves_its_arrays_once():
    cost = hlo.cost(ASYNC_TEXT)
    assert cost.collectives == {"all-gather": 3 * 4 * 8 * 2}
    assert cost.bytes == 2 * (2 * 32 * 8) + 2 * (4 * 8 + 16 * 8)  # what is negated, read and written; a part read, and all of it written
