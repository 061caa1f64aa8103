"""Weights that are more than an array: quantised in few bits, or with the codes that their file stores beside them.

A `Quantized` matrix is integer codes with scales in place of the matrix (weight-only quantisation). A number is `code * scale`. With `int8`
every output has one scale, which is applied to the product: what is multiplied are the codes themselves, exact in bfloat16, too. With
`int4` every group of inputs of an output has one (as in GPTQ, Frantar et al. 2023): a few rows are multiplied by such codes group by group,
and then by the scales; for more rows the matrix is made first, which XLA writes out. Tables of the vocabulary (embedding and LM head) are
`int8` in both. Activations, caches, norms and biases stay as they are. `weights/quantize.py` quantises.

A `Stored` matrix is the matrix itself, and beside it `Codes` that stand for the very same numbers, as GGUF files and branch folders store
them. Kernels that multiply may read these, a quarter of the matrix or less, in the order that `ops.pack_codes` gives them; all else reads
the matrix.

Axes: O outputs, I inputs, G groups of inputs that share a scale, V vocabulary, D hidden.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from eesd_jax.config import NOT_QUANTIZED


class Quantized(NamedTuple):
    """A matrix, or a stack of them.

    codes: int8 or int4 [..., O, I]. scale: float32 [..., O, 1], or bfloat16 [..., O, G].
    """

    codes: jax.Array
    scale: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Gives that of the matrix."""
        return self.codes.shape


class Codes(NamedTuple):
    """A weight [O, I] as files store it: `scale * code + offset`, rounded after each of the two, with a scale and an offset a group.

    codes: uint8 [O, I / 2], two codes of 0..15 a byte, those of a group's first half in the low bits and of its second half in the high
    ones; or int8 [O, I], which have no offset. scale, offset: float32 [O, G], or None for the offset. Groups are of `GROUP` inputs.
    """

    codes: jax.Array
    scale: jax.Array
    offset: jax.Array | None

    @property
    def outputs(self) -> int:
        """Counts the outputs that the codes are of."""
        return self.codes.shape[0]


class Packed(Protocol):
    """The codes of some weights, output after output, in the order in which a platform's kernels read them: a pytree of arrays."""

    @property
    def outputs(self) -> int:
        """Counts the outputs that the codes are of."""
        ...


class Stored(NamedTuple):
    """A matrix, and the codes of the same numbers, which kernels may read in its place.

    dense: [O, I]. codes: of this weight, or of this one and those after it that the same input is multiplied by; None where they lie with
    those of a weight before it.
    """

    dense: "jax.Array | Quantized"
    codes: Packed | None

    @property
    def shape(self) -> tuple[int, ...]:
        """Gives that of the matrix."""
        return self.dense.shape


Weight = jax.Array | Quantized | Stored


class Scheme(NamedTuple):
    """How a matrix is quantised. group: inputs that share a scale, at most; None: all of an output."""

    dtype: Any
    scale_dtype: Any
    group: int | None


GROUP = 32  # inputs whose codes share a scale in a file
SCHEMES = {"int8": Scheme(jnp.int8, jnp.float32, None), "int4": Scheme(jnp.int4, jnp.bfloat16, 128)}
_TABLES = "int8"  # with 4 bits they would lose more than blocks do, and they are a small part of a large model


def group_size(kind: str, inputs: int) -> int:
    """How many inputs share a scale; fewer than the scheme's where those do not divide evenly."""
    group = SCHEMES[kind].group
    return inputs if group is None else math.gcd(inputs, group)


def shapes(shape: tuple[int, int], kind: str) -> Quantized:
    """Shapes and dtypes (`jax.ShapeDtypeStruct`) of a quantised matrix [O, I]."""
    scheme, (outputs, inputs) = SCHEMES[kind], shape
    groups = inputs // group_size(kind, inputs)
    return Quantized(jax.ShapeDtypeStruct(shape, scheme.dtype), jax.ShapeDtypeStruct((outputs, groups), scheme.scale_dtype))


def kinds(abstract: dict[str, Any], quantize: str) -> dict[str, Any]:
    """How each weight is stored, in the structure of the params: the name of a scheme, or `none`.

    Args:
      abstract: params, or anything with their structure and shapes. quantize: of the matrices of blocks: one of `config.QUANTIZATIONS`.
    """

    def kind(leaf: Any, scheme: str) -> str:
        return scheme if quantize != NOT_QUANTIZED and len(leaf.shape) == 2 else NOT_QUANTIZED

    tables = {name: kind(leaf, _TABLES) for name, leaf in abstract.items() if name != "blocks"}
    return tables | {"blocks": jax.tree.map(lambda leaf: kind(leaf, quantize), abstract["blocks"])}


def to_dense(weight: Weight, dtype: jnp.dtype) -> jax.Array:
    """Makes the matrix of a weight, rounded once; one that is not quantised is given back as it is."""
    if isinstance(weight, Stored):
        weight = weight.dense
    if not isinstance(weight, Quantized):
        return weight
    codes, scale = weight
    # 4-bit codes for bfloat16 are multiplied in it, which rounds once, too: XLA may write out what comes of it.
    wide = jnp.promote_types(dtype, scale.dtype)
    groups = codes.reshape(*scale.shape, -1).astype(wide) * scale[..., None].astype(wide)  # [..., O, G, I / G]
    return groups.reshape(codes.shape).astype(dtype)


def take_rows(table_VxD: Weight, ids: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Takes rows of a table, [..., D], in that dtype if it is quantised."""
    if isinstance(table_VxD, Stored):
        table_VxD = table_VxD.dense
    if not isinstance(table_VxD, Quantized):
        return table_VxD[ids]
    return to_dense(Quantized(table_VxD.codes[ids], table_VxD.scale[ids]), dtype)


def split_by_group(x: jax.Array, groups: int) -> jax.Array:
    """[..., I] to [..., G, I]: a row for every group of inputs, the others 0 in it; its product with codes is one of that group alone."""
    inputs = x.shape[-1]
    own_GxI = jnp.arange(inputs) // (inputs // groups) == jnp.arange(groups)[:, None]
    return jnp.where(own_GxI, x[..., None, :], 0)


def keep_in_loop(weight: Quantized, x: jax.Array) -> tuple[Quantized, jax.Array]:
    """The same two, tied together, so that nothing made of the weight alone is moved in front of a loop in which x changes.

    Decoding is a loop over steps, and weights do not change in it: XLA would make floats of all of them at once, and keep them.
    """
    return jax.lax.optimization_barrier((weight, x))


def rounded(weight_OxI: jax.Array) -> Codes | None:
    """Makes codes of 8 bits near to a weight, to half of a 127th of the greatest of each group; None where groups do not fit."""
    outputs, inputs = weight_OxI.shape
    if inputs % GROUP:
        return None
    groups = weight_OxI.astype(jnp.float32).reshape(outputs, -1, GROUP)
    # Scales of 16 bits, which kernels read as such; a group whose scale would be 0 is.
    scale = (jnp.max(jnp.abs(groups), axis=-1) / 127).astype(jnp.float16).astype(jnp.float32)
    codes = jnp.where(scale[..., None] > 0, jnp.round(groups / jnp.where(scale > 0, scale, 1.0)[..., None]), 0)
    return Codes(jnp.clip(codes, -127, 127).astype(jnp.int8).reshape(outputs, inputs), scale, None)


def of_bytes(weight_OxI: jax.Array) -> Codes | None:
    """Finds the codes of 8 bits that stand for the very numbers of a weight, or None where there are none (see `rounded`)."""
    codes = rounded(weight_OxI)
    return codes if codes is not None and bool(jnp.all(numbers(codes) == weight_OxI)) else None


def numbers(codes: Codes) -> jax.Array:
    """Makes the numbers that codes of 8 bits stand for, float32 [O, I]."""
    groups = codes.codes.reshape(*codes.scale.shape, GROUP) * codes.scale[..., None]
    return groups.reshape(codes.codes.shape)


def of_quantized(weight: Quantized) -> Codes | None:
    """Makes the codes of a quantised weight in groups of 32, or None where its inputs are not so many whole groups.

    The numbers that they stand for are the weight's own, to the bit: scales of 4-bit codes have few enough digits for that.
    """
    outputs, inputs = weight.shape
    if inputs % GROUP:
        return None
    scale = jnp.repeat(weight.scale.astype(jnp.float32), inputs // GROUP // weight.scale.shape[1], axis=1)
    if weight.codes.dtype == jnp.int8:
        return Codes(weight.codes, scale, None)
    halves = (weight.codes.astype(jnp.int8) + 8).astype(jnp.uint8).reshape(outputs, -1, 2, GROUP // 2)
    return Codes((halves[:, :, 0] | halves[:, :, 1] << 4).reshape(outputs, -1), scale, -8 * scale)


def concatenate(parts: Sequence[Codes]) -> Codes:
    """Joins the codes of weights of one kind, output after output."""
    return Codes(*(None if arrays[0] is None else jnp.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def same_kind(parts: Sequence[Codes]) -> bool:
    """Says whether `concatenate` can take them."""
    return len({(part.codes.dtype, part.codes.shape[1], part.offset is None) for part in parts}) == 1


def codes_of(weights: Sequence[Weight]) -> Packed | None:
    """Finds the codes of exactly these weights, one after the other; None where they lie apart, or where there are none."""
    first, *rest = weights
    if not isinstance(first, Stored) or any(not isinstance(weight, Stored) or weight.codes is not None for weight in rest):
        return None
    outputs = sum(weight.shape[0] for weight in weights)
    return first.codes if first.codes is not None and first.codes.outputs == outputs else None


def has_codes(tree: Any) -> bool:
    """Says whether any weight of a pytree has codes beside it."""
    return any(map(_is_stored, jax.tree.leaves(tree, is_leaf=_is_stored)))


def dense(tree: Any) -> Any:
    """Takes the codes away: params as they are trained, fingerprinted, and split over devices."""
    return jax.tree.map(lambda leaf: leaf.dense if _is_stored(leaf) else leaf, tree, is_leaf=_is_stored)


def read(tree: Any) -> Any:
    """Keeps of each weight what a pass over few tokens reads: codes in place of what they stand for."""
    return jax.tree.map(lambda leaf: leaf.codes if _is_stored(leaf) else leaf, tree, is_leaf=_is_stored)


def _is_stored(leaf: Any) -> bool:
    return isinstance(leaf, Stored)
