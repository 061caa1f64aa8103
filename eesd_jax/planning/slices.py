"""Finds TPU slices and nodes of GPUs by their names: their chips and links, and TPU devices to compile for, none of which need be there."""

import importlib.util
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from eesd_jax.cluster.hardware import Chip, find_chip
from eesd_jax.errors import UserError

_DIMENSIONS = {"v4": 3, "v5e": 2, "v5p": 3, "v6e": 2}  # of the torus
_KINDS = {"v4": "TPU v4", "v5e": "TPU v5e", "v5p": "TPU v5p", "v6e": "TPU v6e"}
_KINDS |= {"a100": "NVIDIA A100", "h100": "NVIDIA H100", "h200": "NVIDIA H200"}
FAMILIES = tuple(_KINDS)
_NODE = 8  # GPUs that NVLink joins
# What is offered, by family: slices of Google's documentation, and parts of a node.
_SMALL = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
_OFFERED = {2: _SMALL, 3: _CUBES, 1: ("1", "2", "4", "8")}


class Slice(NamedTuple):
    """One or several TPU slices, or nodes of GPUs, joined by a network.

    name: of one. count: how many. chips: of all together. chip: the data sheet of one. links: of the chip that has the fewest.
    """

    name: str
    count: int
    chips: int
    chip: Chip
    links: int

    @property
    def is_tpu(self) -> bool:
        """Says whether there is a compiler for it; others are planned by arithmetic alone."""
        return self.name.partition(":")[0] in _DIMENSIONS

    @property
    def title(self) -> str:
        return self.name if self.count == 1 else f"{self.count} x {self.name}"


def parse_topology(topology: str) -> tuple[str, list[int]]:
    """Parses a name such as `v5p:2x2x4` or `h100:8` into family and dimensions; raises UserError for any other text."""
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", topology)
    family, sizes = (match[1], [int(size) for size in match[2].split("x")]) if match else ("", [])
    is_node = family in _KINDS and family not in _DIMENSIONS
    if family not in _KINDS or len(sizes) != _DIMENSIONS.get(family, 1) or 0 in sizes or (is_node and sizes[0] > _NODE):
        known = ", ".join(f"{name}:{'x'.join('ABC'[:count])}" for name, count in _DIMENSIONS.items())
        nodes = ", ".join(f"{name}:N" for name in _KINDS if name not in _DIMENSIONS)
        raise UserError(
            f"topology is {topology!r}; expected one of {known}, with the numbers of chips along each dimension, or {nodes}, "
            f"with 1 to {_NODE} GPUs of a node"
        )
    return family, sizes


def offered(family: str) -> list[str]:
    """Lists the names of a family's slices that are offered, smallest first; raises UserError for an unknown family."""
    if family not in _KINDS:
        raise UserError(f"family of chips is {family!r}; expected one of {', '.join(FAMILIES)}")
    return [f"{family}:{sizes}" for sizes in _OFFERED[_DIMENSIONS.get(family, 1)]]


def find_slice(topology: str, count: int = 1) -> Slice:
    """Looks up a slice, or `count` of them, by name; raises UserError where there is no such topology."""
    family, sizes = parse_topology(topology)
    return Slice(topology, count, count * math.prod(sizes), find_chip(_KINDS[family]), links_of((family, sizes)))


def find_devices(where: Slice) -> Sequence[jax.Device]:
    """Returns the chips of TPU slices as devices to compile for; none need be there.

    Raises:
      UserError: no such slice, or no libtpu to compile with.
    """
    _, sizes = parse_topology(where.name)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"topology {where.name!r} is compiled for by libtpu, which is not installed; expected pip install 'jax[tpu]'")
    options: dict[str, Any] = {"num_slices": where.count} if where.count > 1 else {}
    if where.name.startswith("v4"):
        options["chip_config_name"] = "megacore"  # one device a chip, as it runs
    if math.prod(sizes) < 4:  # a part of a host
        options["chips_per_host_bounds"] = (*sizes, *[1] * (3 - len(sizes)))
    try:
        return topologies.get_topology_desc(where.name, "tpu", **options).devices
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"topology is {where.name!r}, which libtpu refuses ({reason}); expected a slice that there is") from None


def links_of(topology: tuple[str, list[int]]) -> int:
    """Counts the links that every chip of a slice has: two along a dimension whose ends are joined, else one, as the ends have.

    A GPU has one, to the switch.
    """
    family, sizes = topology
    if family not in _DIMENSIONS:
        return int(sizes[0] > 1)
    # A torus: of v5e and v6e a whole pod, of v4 and v5p any slice that is made of whole cubes of 4 x 4 x 4.
    joined = [size == 16 for size in sizes] if _DIMENSIONS[family] == 2 else [all(size % 4 == 0 for size in sizes)] * 3
    return sum(0 if size == 1 else 1 + ring for size, ring in zip(sizes, joined, strict=True))
