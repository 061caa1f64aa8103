"""Products of a few rows and several weights on a CPU: which kernel multiplies what, as implementations of `ops.linears`."""

import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from eesd_jax.kernels.cpu import codes as cpu_codes
from eesd_jax.kernels.cpu import integers
from eesd_jax.kernels.cpu import rows as cpu_rows
from eesd_jax.kernels.cpu.integers import Integers
from eesd_jax.model import ops, stored
from eesd_jax.model.stored import Weight

_SPLITS = 2


def can_read_codes(x: jax.Array, weights: Sequence[Weight], preferred_element_type: jnp.dtype | None = None) -> bool:
    """Whether the weights have codes that lie together, and a kernel multiplies so many rows by them."""
    del preferred_element_type
    codes = stored.codes_of(weights)
    return codes is not None and (isinstance(codes, Integers) or cpu_codes.usable(_rows(x), codes))


def by_codes(x: jax.Array, weights: Sequence[Weight], preferred_element_type: jnp.dtype | None = None) -> list[jax.Array]:
    """`ops.linears` by codes, which is one product: each has its price, however small."""
    del preferred_element_type  # float32, as are the rows
    codes = stored.codes_of(weights)
    multiply = integers.rows_by_integers if isinstance(codes, Integers) else cpu_codes.rows_by_codes
    return _split(x, multiply(x.reshape(-1, x.shape[-1]), codes), weights)


def can_read_matrices(x: jax.Array, weights: Sequence[Weight], preferred_element_type: jnp.dtype | None = None) -> bool:
    """Whether the weights are matrices that `rows_by_matrix` takes."""
    del preferred_element_type
    return all(isinstance(weight, jax.Array) and cpu_rows.usable(_rows(x), weight) for weight in weights)


def by_matrices(x: jax.Array, weights: Sequence[jax.Array], preferred_element_type: jnp.dtype | None = None) -> list[jax.Array]:
    """`ops.linears` by matrices of float32, all in one call."""
    del preferred_element_type
    return _split(x, cpu_rows.rows_by_matrix(x.reshape(-1, x.shape[-1]), *weights), weights)


def is_one_row(x: jax.Array, weights: Sequence[Weight], preferred_element_type: jnp.dtype | None = None) -> bool:
    """Whether this is one row times one matrix, which can be split evenly."""
    del preferred_element_type
    return len(weights) == 1 and isinstance(weights[0], jax.Array) and _rows(x) == 1 and weights[0].shape[0] % _SPLITS == 0


def one_row(x: jax.Array, weights: Sequence[jax.Array], preferred_element_type: jnp.dtype | None = None) -> list[jax.Array]:
    """`ops.linears` in a form that XLA runs on all cores, and at the speed of memory: a product of one row it runs on one."""
    (weight_OxI,), row = weights, x.reshape(1, -1)
    split_CxOxI = weight_OxI.reshape(_SPLITS, -1, weight_OxI.shape[1])
    repeated_CxRxI = jnp.broadcast_to(row, (_SPLITS, *row.shape))
    product = ops.einsum("cri,coi->cro", repeated_CxRxI, split_CxOxI, preferred_element_type=preferred_element_type)
    return [product.reshape(*x.shape[:-1], -1)]


def _rows(x: jax.Array) -> int:
    return math.prod(x.shape[:-1])


def _split(x: jax.Array, product_RxO: jax.Array, weights: Sequence[Weight]) -> list[jax.Array]:
    """Each weight's part of a product, in the shape of x."""
    product = product_RxO.reshape(*x.shape[:-1], -1)
    if len(weights) == 1:
        return [product]
    ends = itertools.accumulate(weight.shape[0] for weight in weights[:-1])
    return jnp.split(product, list(ends), axis=-1)
