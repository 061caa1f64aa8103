"""Looks up the data sheets of accelerators, for utilisation and planning and never for results; and the processor's name."""

import contextlib
import pathlib
import platform
from typing import NamedTuple


class Chip(NamedTuple):
    """A data sheet. flops: bfloat16 multiplications and additions a second, dense. memory: bytes. bandwidth: bytes a second to its memory.

    link: bytes a second, one way: of a TPU over one link to a neighbour in the slice; of a GPU over all of NVLink, to the others of a node.
    """

    flops: float
    memory: float
    bandwidth: float
    link: float


# TPUs: https://cloud.google.com/tpu/docs/v4, /v5e, /v5p and /v6e, whose figure for all links of a chip is divided by their number (4 in a
# two-dimensional torus, 6 in a three-dimensional one), and by 2 where it is said to be of both directions.
# GPUs: NVIDIA's data sheets of the A100 80GB, H100 and H200 in their SXM form; NVLink's figure is of both directions.
# By the beginning of `jax.Device.device_kind`; the longest match counts.
_CHIPS = {
    "TPU v4": Chip(275e12, 32 * 2**30, 1.228e12, 50e9),
    "TPU v5 lite": Chip(197e12, 16 * 2**30, 0.819e12, 50e9),
    "TPU v5e": Chip(197e12, 16 * 2**30, 0.819e12, 50e9),
    "TPU v5": Chip(459e12, 95 * 2**30, 2.765e12, 100e9),
    "TPU v5p": Chip(459e12, 95 * 2**30, 2.765e12, 100e9),
    "TPU v6 lite": Chip(918e12, 32 * 2**30, 1.6e12, 100e9),
    "TPU v6e": Chip(918e12, 32 * 2**30, 1.6e12, 100e9),
    "NVIDIA A100": Chip(312e12, 80 * 2**30, 2.039e12, 300e9),
    "NVIDIA H100": Chip(989e12, 80 * 2**30, 3.35e12, 450e9),
    "NVIDIA H200": Chip(989e12, 141e9, 4.8e12, 450e9),
}


def find_chip(device_kind: str) -> Chip | None:
    """Finds the data sheet of a device; None where it is not known (CPUs)."""
    matches = [name for name in _CHIPS if device_kind.startswith(name)]
    return _CHIPS[max(matches, key=len)] if matches else None


def cpu_name() -> str:
    """Reads what the processor calls itself."""
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
