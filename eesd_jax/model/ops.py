"""The operations that a pass waits for, each in plain JAX, and where a kernel may step in for one.

An operation is one function with one signature. Its body here is right on every platform, and whoever reads the model reads only this. A
kernel is another implementation of the same function for one platform, with a question before it: does it accept these shapes and dtypes?
`Operation` asks the kernels of the platform that a program is traced for, and runs the plain body where none accepts. It also does so where
the compiler splits arrays over devices: XLA can split its own operations, but not a kernel.

To add a kernel, write it in `eesd_jax/kernels/PLATFORM/` (named as `jax.default_backend()` names it) and register it in that folder's
`__init__.py`: `ops.argmax.register(PLATFORM, accepts, call)`, where both functions take the operation's own arguments. That is all: the
folder is imported (`eesd_jax.load_kernels`) when the first program is traced for that platform, and nothing else imports it. A test in
`tests/kernels/` holds the kernel against the plain body, which runs under `with kernels_for(PLAIN):`.

Operations on the key/value cache stand beside its type, in `model/cache.py`.

Axes: B batch, T tokens of this pass, S cache capacity, N query heads, K key/value heads, G = N/K, H head dim; I inputs and O outputs of a
weight, R rows.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

import eesd_jax
from eesd_jax.model import rope, stored
from eesd_jax.model.config import ModelConfig
from eesd_jax.model.stored import Codes, Packed, Quantized, Stored, Weight

P, R = ParamSpec("P"), TypeVar("R")

PLAIN = "plain"
# The platform whose kernels are asked: by default (the empty name) that of this process. `with kernels_for("tpu"):` where a program is
# compiled for another machine, `with kernels_for(PLAIN):` for no kernels at all.
kernels_for = jax.make_user_context("")

# Rows, one for every group of inputs, up to which a product costs less than to write out the weight: the arithmetic of reading it once.
_MOST_GROUP_ROWS = 256
_READ_AT_LEAST = 1024  # slots of a cache
_TOP_GROUP = 128  # numbers of which the greatest is found first


class Kernel(NamedTuple):
    """An implementation of an operation for one platform; `accepts` and `call` take the operation's arguments."""

    platform: str
    accepts: Callable[..., bool]
    call: Callable[..., Any]


class Operation(Generic[P, R]):
    """A function in plain JAX that kernels may stand in for.

    Attributes:
      plain: the function itself.
    """

    def __init__(self, plain: Callable[P, R]):
        self.plain = plain
        self._kernels: list[Kernel] = []
        functools.update_wrapper(self, plain)

    def register(self, platform: str, accepts: Callable[P, bool], call: Callable[P, R]) -> None:
        """Adds a kernel; those that were added before are asked first."""
        self._kernels.append(Kernel(platform, accepts, call))

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Runs the first kernel that accepts these arguments, else the plain function."""
        if not over_devices((args, kwargs)):
            for kernel in self.kernels():
                if kernel.accepts(*args, **kwargs):
                    return kernel.call(*args, **kwargs)
        return self.plain(*args, **kwargs)

    def kernels(self) -> list[Kernel]:
        """Lists the kernels for the platform that programs are traced for."""
        platform = kernels_for.value or jax.default_backend()
        if platform != PLAIN:
            eesd_jax.load_kernels(platform)
        return [kernel for kernel in self._kernels if kernel.platform == platform]


def over_devices(tree: Any) -> bool:
    """Says whether the compiler splits any array of a pytree over devices (what `shard_map` runs on each device by itself is not split)."""
    meshes = {jax.typeof(leaf).sharding.mesh for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)}
    axes = (axis for mesh in meshes for axis in zip(mesh.axis_sizes, mesh.axis_types, strict=True))
    return any(size > 1 and kind != AxisType.Manual for size, kind in axes)


def einsum(formula: str, x: jax.Array, y: jax.Array, **kwargs: Any) -> jax.Array:
    """`jnp.einsum` that computes in the arithmetic its operands' dtype promises."""
    # On accelerators the default for float32 operands is not float32 arithmetic; asking for float32 means it here.
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jnp.einsum(formula, x, y, precision=precision, **kwargs)


def linear(x: jax.Array, weight: Weight, preferred_element_type: jnp.dtype | None = None) -> jax.Array:
    """Multiplies x [..., I] by a weight, which is stored as [O, I]: [..., O]."""
    return linears(x, (weight,), preferred_element_type)[0]


@Operation
def linears(x: jax.Array, weights: Sequence[Weight], preferred_element_type: jnp.dtype | None = None) -> list[jax.Array]:
    """Multiplies x [..., I] by several weights, each stored as [O, I]: a product [..., O] of each."""
    if len(weights) > 1:
        return [linear(x, weight, preferred_element_type) for weight in weights]
    (weight,) = weights
    if isinstance(weight, Stored):
        return [linear(x, weight.dense, preferred_element_type)]
    if isinstance(weight, Quantized):
        return [_linear_quantized(x, weight, preferred_element_type)]
    product_RxO = einsum("ri,oi->ro", x.reshape(-1, x.shape[-1]), weight, preferred_element_type=preferred_element_type)
    return [product_RxO.reshape(*x.shape[:-1], -1)]


def _linear_quantized(x: jax.Array, weight: Quantized, preferred_element_type: jnp.dtype | None) -> jax.Array:
    dtype = preferred_element_type or x.dtype
    weight, x = stored.keep_in_loop(weight, x)
    rows, groups = math.prod(x.shape[:-1]), weight.scale.shape[-1]
    # Devices would send each other the products of all groups, where groups are split over them.
    if groups > 1 and (rows * groups > _MOST_GROUP_ROWS or over_devices((x, weight))):
        return linear(x, stored.to_dense(weight, x.dtype), dtype)
    parts = stored.split_by_group(x, groups)  # [..., G, I]
    product = linear(parts, weight.codes.astype(x.dtype), jnp.float32)  # [..., G, O]
    return jnp.sum(product * weight.scale.T.astype(jnp.float32), axis=-2).astype(dtype)


@Operation
def pack_codes(codes: Codes) -> Packed | None:
    """Arranges a weight's codes as `linears` reads them; None where it does not, as here."""
    del codes
    return None


class Visible(NamedTuple):
    """Which of the tokens before it a token attends to, besides itself.

    mask: bool [T, T] or [B, T, T], which of this pass's tokens see which (trees, or texts packed into a row); None: all before, and self.
    window: the last `window` positions only, self included (an int or a traced one); None for all.
    offset_T: int32 [T], the position of each token behind the first one; None: 0, 1, 2, ...
    """

    mask: jax.Array | None = None
    window: jax.Array | int | None = None
    offset_T: jax.Array | None = None

    def among(self, length: int) -> jax.Array:
        """The mask [T, T] or [B, T, T] of this pass's tokens, the window included."""
        mask = causal_mask(length) if self.mask is None else self.mask
        if self.window is None:
            return mask
        offset_T = self.offsets(length)
        return mask & (offset_T[:, None] - offset_T[None, :] < self.window)

    def offsets(self, length: int) -> jax.Array:
        """int32 [T]."""
        return jnp.arange(length) if self.offset_T is None else self.offset_T


def causal_mask(length: int) -> jax.Array:
    """Bool [T, T]: token t sees tokens 0..t."""
    return jnp.tril(jnp.ones((length, length), bool))


@Operation
def attention(q_BxTxNxH: jax.Array, k: jax.Array, v: jax.Array, visible: Visible) -> jax.Array:
    """Attends over this pass's own tokens: grouped queries, where nothing came before.

    Args:
      q_BxTxNxH: rotated and scaled queries.
      k, v: [B, K, H, T] and [B, K, T, H], rotated keys and values.
      visible: which tokens see which.

    Returns:
      [B, T, N, H] in the queries' dtype; softmax in float32.
    """
    q, mask = _group_queries(q_BxTxNxH, k.shape[1]), _over_heads(visible.among(q_BxTxNxH.shape[1]))
    batch, kv_heads, _, length, head_dim = q.shape
    # Queries of all heads of a group as rows of one matrix: then XLA multiplies the gradient's matrices, too, as they lie.
    rows = q.reshape(batch, kv_heads, -1, head_dim)
    raw = einsum("bkrh,bkhs->bkrs", rows, k, preferred_element_type=jnp.float32)
    scores = jnp.where(mask, raw.reshape(*q.shape[:4], length), -jnp.inf)
    # Finite, as every token sees itself; it changes nothing but the rounding, so it has no gradient.
    peak = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.exp(scores - peak)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    rows = weights.astype(v.dtype).reshape(batch, kv_heads, -1, length)
    out = einsum("bkrs,bksh->bkrh", rows, v, preferred_element_type=jnp.float32).reshape(q.shape)
    return _ungroup((out / total).astype(q.dtype))


@Operation
def cached_attention(
    q_BxTxNxH: jax.Array,
    new_k: jax.Array,
    new_v: jax.Array,
    cached_k: jax.Array,
    cached_v: jax.Array,
    start_B: jax.Array,
    visible: Visible,
) -> jax.Array:
    """Attends over the valid part of the cache and over this pass's own tokens: grouped queries.

    The two parts share one softmax without being concatenated: nothing of the cache's size is copied.

    Args:
      q_BxTxNxH: rotated and scaled queries.
      new_k, new_v: [B, K, H, T] and [B, K, T, H], this pass's own (rotated) keys and values.
      cached_k, cached_v: [B, K, H, S] and [B, K, S, H].
      start_B: int32 [B]; row b's cache is valid in [0, start_b), and its tokens stand at positions start_b + offset_t.
      visible: which tokens see which. Offsets other than 0, 1, 2, ... go with a mask.

    Returns:
      [B, T, N, H] in the queries' dtype; softmax in float32.
    """
    length = q_BxTxNxH.shape[1]
    q, mask, offset_T = _group_queries(q_BxTxNxH, new_k.shape[1]), _over_heads(visible.among(length)), visible.offsets(length)

    def scores(keys: jax.Array, seen: jax.Array) -> jax.Array:
        raw = einsum("bkgth,bkhs->bkgts", q, keys, preferred_element_type=jnp.float32)
        return jnp.where(seen, raw, -jnp.inf)

    def over(size: int) -> tuple[jax.Array, jax.Array]:
        """Attends with the first `size` slots of the cache: the sum of values, and that of weights."""
        k, v = cached_k[..., :size], cached_v[:, :, :size]
        slot_S = jnp.arange(k.shape[3])
        seen = (slot_S < start_B[:, None])[:, None]  # [B, 1, S]
        if visible.window is not None:
            position_BxT = start_B[:, None] + offset_T
            seen = seen & (position_BxT[:, :, None] - slot_S < visible.window)  # [B, T, S]
        new_scores, old_scores = scores(new_k, mask), scores(k, seen[:, None, None])
        peak = jnp.maximum(jnp.max(new_scores, axis=-1, keepdims=True), jnp.max(old_scores, axis=-1, keepdims=True))
        new_weights, old_weights = jnp.exp(new_scores - peak), jnp.exp(old_scores - peak)
        total = jnp.sum(new_weights, axis=-1, keepdims=True) + jnp.sum(old_weights, axis=-1, keepdims=True)
        out = einsum("bkgts,bksh->bkgth", old_weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        out += einsum("bkgts,bksh->bkgth", new_weights.astype(new_v.dtype), new_v, preferred_element_type=jnp.float32)
        return out, total

    # Masks hide what is not valid, but it would be read: of a long cache no more than the longest row needs, in a few steps of size.
    sizes = _sizes_to_read(cached_k.shape[3])
    choice = jnp.searchsorted(jnp.array(sizes), jnp.max(start_B))
    out, total = jax.lax.switch(choice, [functools.partial(over, size) for size in sizes])
    return _ungroup((out / total).astype(q.dtype))


def _group_queries(q_BxTxNxH: jax.Array, kv_heads: int) -> jax.Array:
    """[B, K, G, T, H]: the queries that share a key/value head together."""
    batch, length, heads, head_dim = q_BxTxNxH.shape
    return q_BxTxNxH.reshape(batch, length, kv_heads, heads // kv_heads, head_dim).transpose(0, 2, 3, 1, 4)


def _ungroup(out_BxKxGxTxH: jax.Array) -> jax.Array:
    """[B, T, N, H]."""
    batch, kv_heads, group, length, head_dim = out_BxKxGxTxH.shape
    return out_BxKxGxTxH.transpose(0, 3, 1, 2, 4).reshape(batch, length, kv_heads * group, head_dim)


def _over_heads(mask: jax.Array) -> jax.Array:
    """A mask [T, T] or [B, T, T] that broadcasts over [B, K, G, T, T]."""
    return mask if mask.ndim == 2 else mask[:, None, None]


def _sizes_to_read(capacity: int) -> tuple[int, ...]:
    """How many slots of a cache are read at once, one of these; each costs compile time."""
    sizes = [capacity]
    while sizes[0] > _READ_AT_LEAST:
        sizes.insert(0, -(-sizes[0] // 2))
    return tuple(sizes)


@Operation
def rotation(config: ModelConfig, x_BxTxD: jax.Array, start_B: jax.Array, offset_T: jax.Array) -> rope.Rotation:
    """Takes the sines and cosines of a pass's tokens at positions start_b + offset_t (int32 [B] and [T]), once a pass.

    Args:
      x_BxTxD: the residual stream before the pass; only where it lies matters.
    """
    del x_BxTxD
    return rope.rotation(config.rope, config.head_dim, start_B[:, None] + offset_T)


@Operation
def argmax(x: jax.Array) -> jax.Array:
    """Finds the greatest number of the last axis, of several the first: int32 [...] of [..., V]."""
    return jnp.argmax(x, axis=-1).astype(jnp.int32)


@Operation
def top_k(x: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Finds the greatest numbers of the last axis, as `jax.lax.top_k` does, which XLA for CPU implements by sorting all of it.

    Only the groups of numbers that have the greatest maxima are looked into.
    """
    groups = -(-x.shape[-1] // _TOP_GROUP)
    if groups <= 2 * count:
        return jax.lax.top_k(x, count)
    padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, groups * _TOP_GROUP - x.shape[-1])], constant_values=-jnp.inf)
    grouped = padded.reshape(*x.shape[:-1], groups, _TOP_GROUP)
    # In increasing order, so that of equal values the first is taken, as `lax.top_k` does.
    chosen = jnp.sort(jax.lax.top_k(jnp.max(grouped, axis=-1), count)[1], axis=-1)
    kept = jnp.take_along_axis(grouped, chosen[..., None], axis=-2).reshape(*x.shape[:-1], count * _TOP_GROUP)
    values, places = jax.lax.top_k(kept, count)
    return values, jnp.take_along_axis(chosen, places // _TOP_GROUP, axis=-1) * _TOP_GROUP + places % _TOP_GROUP
