"""TPU slices by their names: chips to compile for, without any being there."""

import importlib.util
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from eesd_jax.errors import UserError
from eesd_jax.hardware import Chip, find_chip

_DIMENSIONS = {"v4": 3, "v5e": 2, "v5p": 3, "v6e": 2}  # of the torus


class Slice(NamedTuple):
    """One or several TPU slices. devices: compile-only, one a chip. chip: its data sheet. links: of the chip that has the fewest."""

    devices: Sequence[jax.Device]
    chip: Chip
    links: int


def parse_topology(topology: str) -> tuple[str, list[int]]:
    """Family and dimensions of a slice, from a name such as `v5p:2x2x4`; raises UserError for what is none."""
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", topology)
    family, sizes = (match[1], [int(size) for size in match[2].split("x")]) if match else ("", [])
    if len(sizes) != _DIMENSIONS.get(family) or 0 in sizes:
        known = ", ".join(f"{name}:{'x'.join('ABC'[:count])}" for name, count in _DIMENSIONS.items())
        raise UserError(f"topology is {topology!r}; expected one of {known}, with the numbers of chips along each dimension")
    return family, sizes


def find_slice(topology: str, count: int = 1) -> Slice:
    """The chips of a slice by its name; none need be there.

    Args:
      count: how many such slices, which a network joins.

    Raises:
      UserError: no such topology, or no libtpu to compile with.
    """
    family, sizes = parse_topology(topology)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"topology {topology!r} is compiled for by libtpu, which is not installed; expected pip install libtpu")
    options: dict[str, Any] = {"num_slices": count} if count > 1 else {}
    if family == "v4":
        options["chip_config_name"] = "megacore"  # one device a chip, as it runs
    if math.prod(sizes) < 4:  # a part of a host
        options["chips_per_host_bounds"] = (*sizes, *[1] * (3 - len(sizes)))
    try:
        devices = topologies.get_topology_desc(topology, "tpu", **options).devices
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"topology is {topology!r}, which libtpu refuses ({reason}); expected a slice that there is") from None
    return Slice(devices, find_chip(devices[0].device_kind), links_of((family, sizes)))


def links_of(topology: tuple[str, list[int]]) -> int:
    """Links that every chip of a slice has: two along a dimension whose ends are joined, else one, which is what the ends have."""
    family, sizes = topology
    # Of v5e and v6e a whole pod is a torus; of v4 and v5p slices that are made of whole cubes of 4 x 4 x 4.
    joined = [size == 16 for size in sizes] if _DIMENSIONS[family] == 2 else [all(size % 4 == 0 for size in sizes)] * 3
    return sum(0 if size == 1 else 1 + ring for size, ring in zip(sizes, joined, strict=True))
