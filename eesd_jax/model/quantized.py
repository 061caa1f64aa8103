"""Weights in few bits: integer codes with scales in place of a matrix, multiplied as floats (weight-only quantisation).

A number is `code * scale`. With `int8` every output has one scale, which is applied to the product: what is multiplied are the codes
themselves, exact in bfloat16, too. With `int4` every group of inputs of an output has one (as in GPTQ, Frantar et al. 2023). A few rows
are multiplied by such codes group by group, and then by the scales; for more the matrix is made first, which XLA writes out. Tables of the
vocabulary (embedding and LM head) are `int8` in both. Activations, caches, norms and biases stay as they are. What makes codes of a weight
is `weights/quantize.py`.

Axes: O outputs, I inputs, G groups of inputs that share a scale, V vocabulary, D hidden.
"""

import math
from typing import Any, NamedTuple

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
        """That of the matrix."""
        return self.codes.shape


class Scheme(NamedTuple):
    """How a matrix is quantised. group: inputs that share a scale, at most; None: all of an output."""

    dtype: Any
    scale_dtype: Any
    group: int | None


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


def to_dense(weight: jax.Array | Quantized, dtype: jnp.dtype) -> jax.Array:
    """The matrix itself, rounded once; one that is not quantised is given back as it is."""
    if not isinstance(weight, Quantized):
        return weight
    codes, scale = weight
    # 4-bit codes for bfloat16 are multiplied in it, which rounds once, too: XLA may write out what comes of it.
    wide = jnp.promote_types(dtype, scale.dtype)
    groups = codes.reshape(*scale.shape, -1).astype(wide) * scale[..., None].astype(wide)  # [..., O, G, I / G]
    return groups.reshape(codes.shape).astype(dtype)


def take_rows(table_VxD: jax.Array | Quantized, ids: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Rows of a table, [..., D], in that dtype if it is quantised."""
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
