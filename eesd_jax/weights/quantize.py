"""Quantises weights while they are read (qwix): to the nearest code, symmetric, by the largest number that shares the scale.

A row's codes and scales depend on that row alone, so they are the same whatever mesh it is read for. They are made on the host's CPU where
there is one for JAX, so that all machines make the same of a weight.
"""

import functools
from collections.abc import Callable

import jax
import numpy as np

from eesd_jax.model import stored
from eesd_jax.model.stored import SCHEMES, Quantized

_PIECE = 2**25  # weights quantised at once, in float32


def quantize(weight_OxI: np.ndarray, kind: str) -> Quantized:
    """Numpy codes and scales of a weight, by the scheme of that name (`stored.SCHEMES`)."""
    rows = max(1, _PIECE // weight_OxI.shape[1])
    with jax.default_device(_host()):
        pieces = [
            jax.device_get(_quantize(np.asarray(weight_OxI[first : first + rows], np.float32), kind))
            for first in range(0, len(weight_OxI), rows)
        ]
    return jax.tree.map(lambda *parts: np.concatenate(parts), *pieces)


def place(shape: tuple[int, int], read: Callable[[tuple[slice, slice]], np.ndarray], kind: str, homes: Quantized) -> Quantized:
    """Quantises a weight of that shape part by part, and places it.

    A process reads whole rows, also where its devices hold parts of them: a scale is of all numbers that share it.

    Args:
      read: gives a part of the weight.
      homes: the sharding of codes and scale.
    """
    rows: dict[str, Quantized] = {}

    def part(field: int, index: tuple[slice, slice]) -> np.ndarray:
        if (key := str(index[0])) not in rows:  # several devices may hold parts of the same
            rows[key] = quantize(read((index[0], slice(None))), kind)
        return rows[key][field][:, index[1]]

    fields = enumerate(zip(stored.shapes(shape, kind), homes, strict=True))
    return Quantized(
        *(jax.make_array_from_callback(array.shape, home, functools.partial(part, i)).block_until_ready() for i, (array, home) in fields)
    )


@functools.partial(jax.jit, static_argnames="kind")
def _quantize(weight_OxI: jax.Array, kind: str) -> Quantized:
    import qwix  # takes more than a second, which only those pay who quantise

    scheme, inputs = SCHEMES[kind], weight_OxI.shape[1]
    # One group of all inputs, too, is a group: the scale then has one column.
    groups = {1: stored.group_size(kind, inputs)}
    found = qwix.quantize(weight_OxI, scheme.dtype, channelwise_axes=(0,), tiled_axes=groups, scale_dtype=scheme.scale_dtype)
    return Quantized(found.qvalue, found.scale)


def _host() -> jax.Device:
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX was told to look for accelerators alone
        return jax.local_devices()[0]
