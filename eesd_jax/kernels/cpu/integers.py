"""Rows times a matrix of 4- or 8-bit codes on a CPU that multiplies small integers: by tiles, or by dot products of bytes.

Verifying drafts multiplies several rows by every weight, and in float32 (`codes.py`) the numbers have to be made of codes, and every row
costs arithmetic of its own. Integers are multiplied as they are stored (`groups.py`), so that a few drafts are verified nearly for free.

Axes: R rows, I inputs, O outputs, G groups of 32 inputs.
"""

from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from eesd_jax.kernels.cpu import dots, tiles
from eesd_jax.kernels.cpu.groups import BLOCK_OUTPUTS, Kind
from eesd_jax.model.stored import Codes


class Integers(NamedTuple):
    """`Codes`, as products of integers take them.

    codes: int8 [O / 16, G, 512]: of inputs 4 i to 4 i + 3 of a group those of the first output, then of the second, up to the sixteenth; or
    uint8 [O / 16, G, 256], the same of codes of 0..15, those of a group's first 16 inputs in the low bits, of the others in the high ones.
    scale, offset: [O / 16, G, 16], float16 where that loses nothing, else float32; there is no offset for bytes.
    """

    codes: jax.Array
    scale: jax.Array
    offset: jax.Array | None

    @property
    def outputs(self) -> int:
        return self.codes.shape[0] * BLOCK_OUTPUTS


def kernel() -> ModuleType | None:
    """What this processor multiplies integers with, None for nothing."""
    return next((module for module in (tiles, dots) if module.available()), None)


def from_codes(codes: Codes) -> Codes | Integers:
    """Integers of codes that they can stand for, on a processor that multiplies them; else the codes."""
    outputs, groups = codes.scale.shape
    if kernel() is None or outputs % BLOCK_OUTPUTS:
        return codes
    blocks, bytes_ = outputs // BLOCK_OUTPUTS, np.asarray(codes.codes)
    # [block, output, group, quadruple of inputs, input] -> [block, group, quadruple, output, input]
    integers = bytes_.reshape(blocks, BLOCK_OUTPUTS, groups, -1, 4).transpose(0, 2, 3, 1, 4).reshape(blocks, groups, -1)

    def per_group(array: jax.Array) -> jax.Array:
        numbers = np.asarray(array).reshape(blocks, BLOCK_OUTPUTS, groups).transpose(0, 2, 1)
        with np.errstate(over="ignore"):
            halves = numbers.astype(np.float16)
        return jnp.asarray(halves if np.array_equal(halves.astype(np.float32), numbers) else numbers)

    return Integers(jnp.asarray(integers), per_group(codes.scale), None if codes.offset is None else per_group(codes.offset))


def rows_by_integers(x_RxI: jax.Array, weight: Integers) -> jax.Array:
    """Float32 [R, I] times the [O, I] that the integers stand for, giving [R, O]."""
    arrays = [array for array in weight if array is not None]
    kind = Kind(weight.offset is not None, tuple(array.dtype == jnp.float16 for array in arrays[1:]))
    return kernel().multiply(x_RxI, kind, arrays)
