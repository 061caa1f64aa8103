"""One table from logical axes to mesh axes, and what follows from it.

Mesh axes: `data` (replicas, across slices), `fsdp` (weights split over their embed axis), `tensor` (heads, mlp and vocabulary).
"""

import functools
import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from eesd_jax.config import NOT_QUANTIZED
from eesd_jax.errors import UserError
from eesd_jax.model import llama, ops, stored
from eesd_jax.model.config import ModelConfig
from eesd_jax.model.stored import Quantized

MESH_AXES = ("data", "fsdp", "tensor")
LOGICAL_AXIS_RULES = (
    ("batch", ("data", "fsdp")),
    ("vocab", "tensor"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("mlp", "tensor"),
    ("embed", "fsdp"),
    ("head_dim", None),
    ("layers", None),
)


def make_mesh(devices: list[jax.Device] | None = None, *, data: int = 1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """A mesh of data x fsdp x tensor devices; `devices` defaults to the first ones there are. UserError where they are too few."""
    shape = (data, fsdp, tensor)
    devices = (jax.devices() if devices is None else devices)[: math.prod(shape)]
    if len(devices) < math.prod(shape):
        raise UserError(f"a mesh of {data} x {fsdp} x {tensor} needs {math.prod(shape)} devices; there are {len(devices)}")
    # Auto axes: Linen's logical constraints do not work with Explicit ones, which jax.make_mesh would choose.
    return Mesh(np.asarray(devices).reshape(shape), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def make_whole_mesh(devices: Sequence[jax.Device], *, data: int, fsdp: int, tensor: int) -> Mesh:
    """A mesh of all those devices, which may be of several processes and of several slices, that a network joins.

    A slice's devices stand together, so that only `data` crosses slices; in it a process's, so that the rows it reads follow each other.

    Raises:
      UserError: see `check_whole_mesh`.
    """
    check_whole_mesh(len(devices), count_slices(devices), data=data, fsdp=fsdp, tensor=tensor)
    return make_mesh(sorted(devices, key=_slice_first), data=data, fsdp=fsdp, tensor=tensor)


def check_whole_mesh(devices: int, slices: int, *, data: int, fsdp: int, tensor: int) -> None:
    """Raises UserError where a mesh is of another number of devices, or has axes that would send too much between slices."""
    text, size = f"mesh is data {data} x fsdp {fsdp} x tensor {tensor}", data * fsdp * tensor
    if size != devices:
        raise UserError(f"{text}, which is {size} devices; expected {devices}, all that there are")
    if data % slices:
        raise UserError(
            f"{text} over {slices} slices; expected a multiple of {slices} for data, the only axis that may lie across slices: "
            "the others send too much for the network between them"
        )


def count_slices(devices: Sequence[jax.Device]) -> int:
    """How many slices devices are of."""
    return len({_slice_of(device) for device in devices})


def _slice_of(device: jax.Device) -> int:
    """Which of several slices a device is of."""
    return getattr(device, "slice_index", 0)


def _slice_first(device: jax.Device) -> tuple[int, int, int]:
    return _slice_of(device), device.process_index, device.id


def mesh_of(array: jax.Array) -> Mesh | None:
    """The mesh that an array is spread over, None where it is on one device."""
    home = array.sharding
    return home.mesh if isinstance(home, NamedSharding) and home.mesh.size > 1 else None


def keep_rows_whole(x: jax.Array) -> jax.Array:
    """Has the compiler leave an array [B, ...] of a program's results split along rows at most, as it was when the program was given it.

    Left to itself, it may return it split as what it was computed from: then the next call, on what this one returned, is another program.
    """
    mesh = jax.typeof(x).sharding.mesh
    if mesh.size <= 1:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec("data" if mesh.shape["data"] > 1 else None)))


def decode_rows_home(mesh: Mesh) -> NamedSharding:
    """Where rows lie in decoding: over `data` alone.

    The devices along `fsdp` then each have a part of every product's sum, and add up activations of a few tokens; with other rows on each
    of them they would have to send each other all weights at every step.
    """
    return NamedSharding(mesh, PartitionSpec("data"))


@functools.cache
def abstract_params(config: ModelConfig) -> llama.Params:
    """Boxed shapes (`jax.ShapeDtypeStruct`) and logical axes of every weight; nothing is allocated."""
    with ops.kernels_for(ops.PLAIN):  # no kernel is compiled only to learn shapes
        return jax.eval_shape(lambda key: llama.init(config, key), jax.random.key(0))


def param_shardings(config: ModelConfig, mesh: Mesh, quantize: str = NOT_QUANTIZED) -> llama.Params:
    """`NamedSharding` of every weight, in the structure of the (unboxed) params. An axis that does not divide evenly is not split."""
    abstract = abstract_params(config)
    shardings = nn.logical_to_mesh_sharding(nn.get_partition_spec(abstract), mesh, LOGICAL_AXIS_RULES)

    def fit(leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> NamedSharding:
        axes = (axis if axis and size % mesh.shape[axis] == 0 else None for size, axis in zip(leaf.shape, sharding.spec, strict=True))
        return NamedSharding(mesh, PartitionSpec(*axes))

    def split(kind: str, leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> NamedSharding | Quantized:
        if kind == NOT_QUANTIZED:
            return fit(leaf, sharding)
        return Quantized(*(fit(array, sharding) for array in stored.shapes(leaf.shape, kind)))

    abstract = nn.meta.unbox(abstract)
    return jax.tree.map(split, stored.kinds(abstract, quantize), abstract, shardings)
