"""Where training runs: the mesh over all devices of all processes, and which rows of a batch each process reads.

Axes: B rows of the global batch; other axes as the arrays have them.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from eesd_jax.config import ExperimentConfig
from eesd_jax.errors import UserError
from eesd_jax.model import sharding


class Layout(NamedTuple):
    """mesh: over all devices. share, shares: this process reads part `share` of `shares` equal parts of the rows of every batch.

    Processes that only hold other parts of the weights of the same rows (a `tensor` axis across processes) have the same share.
    """

    mesh: Mesh
    share: int
    shares: int

    @property
    def rows_home(self) -> NamedSharding:
        """Rows over `data` and `fsdp`."""
        return NamedSharding(self.mesh, PartitionSpec(dict(sharding.LOGICAL_AXIS_RULES)["batch"]))

    def place(self, tree: Any) -> Any:
        """This process's rows, numpy [B / shares, ...], as arrays of all rows on their devices."""

        def place(leaf: np.ndarray) -> jax.Array:
            return jax.make_array_from_process_local_data(self.rows_home, leaf, (leaf.shape[0] * self.shares, *leaf.shape[1:]))

        return jax.tree.map(place, tree)


def mesh_sizes(config: ExperimentConfig, devices: int, slices: int) -> dict[str, int]:
    """The mesh that the config asks for over devices in so many slices; raises UserError where it, or the batch, does not match."""
    wanted = {name: getattr(config.mesh, name) for name in sharding.MESH_AXES}
    open_axes = [name for name, size in wanted.items() if size == -1]
    fixed = math.prod(size for size in wanted.values() if size != -1)
    text = _text(wanted)
    if len(open_axes) > 1 or any(size < 1 and size != -1 for size in wanted.values()):
        raise UserError(f"mesh is {text}; expected positive sizes, and -1 (all that is left) for one axis at most")
    if open_axes:
        if devices % fixed:
            raise UserError(f"mesh is {text}, and the number of devices is {devices}; expected sizes whose product divides it")
        wanted[open_axes[0]] = devices // fixed
    sharding.check_whole_mesh(devices, slices, **wanted)
    rows = config.batch_size // config.optimizer.accumulate
    if rows % (shards := wanted["data"] * wanted["fsdp"]):
        raise UserError(
            f"batch_size is {config.batch_size} in {config.optimizer.accumulate} parts of {rows}; expected parts that are a multiple of "
            f"{shards}, the mesh's data x fsdp"
        )
    return wanted


def _text(sizes: dict[str, int]) -> str:
    return " x ".join(f"{name} {size}" for name, size in sizes.items())


def make_layout(config: ExperimentConfig, all_devices: Sequence[jax.Device] | None = None) -> Layout:
    """What the config asks for, over all devices; raises UserError where it does not match them, or the batch.

    Args:
      all_devices: by default those that there are; `planning/programs.py` gives those of a slice that is not there.
    """
    all_devices = jax.devices() if all_devices is None else all_devices
    wanted = mesh_sizes(config, len(all_devices), sharding.count_slices(all_devices))
    mesh, shards = sharding.make_whole_mesh(all_devices, **wanted), wanted["data"] * wanted["fsdp"]
    first, last = _row_shards(mesh, jax.process_index())
    processes = {device.process_index for device in all_devices}
    spans = {_row_shards(mesh, process) for process in processes}
    if sorted(spans) != [(start, start + last - first) for start in range(0, shards, last - first)]:
        raise UserError(
            f"mesh is {_text(wanted)} over {len(processes)} processes, which would share rows unevenly; "
            "expected a tensor axis that divides a process's devices, or is a multiple of them"
        )
    return Layout(mesh, first // (last - first), shards // (last - first))


def _row_shards(mesh: Mesh, process: int) -> tuple[int, int]:
    """Which of the data x fsdp shards of rows a process's devices hold: from, up to."""
    held = [i for i, shard in enumerate(mesh.devices.reshape(-1, mesh.shape["tensor"])) for d in shard if d.process_index == process]
    return min(held), max(held) + 1
