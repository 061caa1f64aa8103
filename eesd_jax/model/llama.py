"""Llama-family decoder blocks as pure functions of plain pytrees (Touvron et al. 2023; Mistral, Qwen2 and Qwen3 as variations).

One Linen `Block` serves decoding (`forward_blocks`: unrolled over a tuple of per-block params, with a cache) and training
(`scan_blocks`: `lax.scan` over stacked params, without one). Weights keep the [out, in] order of Hugging Face
files, so that loading changes nothing.

Axes: B batch, T tokens of this pass, S cache capacity, N query heads, K key/value heads, G = N/K, H head dim, D hidden, F mlp,
V vocabulary.

Params: {"embed": [V, D], "blocks": (block, ...), "final_norm": [D], "lm_head": [V, D] (absent when tied)}. A matrix may be `Quantized`;
the dtype of the arithmetic is that of the norms. Params that decode may carry the same weights once more, as the codes of their file
(`with_codes`).
"""

import itertools
import math
from collections.abc import Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from eesd_jax.kernels.cpu import calls, integers
from eesd_jax.kernels.cpu import codes as cpu_codes
from eesd_jax.kernels.cpu import rows as cpu_rows
from eesd_jax.kernels.cpu.codes import Codes
from eesd_jax.kernels.cpu.integers import Integers
from eesd_jax.model import ops, quantized, rope
from eesd_jax.model.cache import KVCache
from eesd_jax.model.config import ModelConfig
from eesd_jax.model.quantized import Quantized
from eesd_jax.model.tree import Tree

Params = dict[str, Any]

_CPU_SPLITS = 2
# Rows, one for every group of inputs, up to which a product costs less than to write out the weight: the arithmetic of reading it once.
_MOST_GROUP_ROWS = 256
_CODES, _HEAD_CODES = "codes", "head_codes"


def linear(x: jax.Array, weight_OxI: jax.Array | Quantized, codes: Codes | Integers | None = None, **kwargs: Any) -> jax.Array:
    """X [B, T, I] times a weight stored as [out, in]: [B, T, O]. Its codes, if given, are read in its place where that is faster."""
    rows = x.reshape(-1, x.shape[-1])
    if _reads_codes(rows.shape[0], codes):
        by_codes = integers.rows_by_integers if isinstance(codes, Integers) else cpu_codes.rows_by_codes
        return by_codes(rows, codes).reshape(*x.shape[:-1], -1)
    if isinstance(weight_OxI, Quantized):
        return _linear_quantized(x, weight_OxI, **kwargs)
    if cpu_rows.usable(rows.shape[0], weight_OxI):
        return cpu_rows.rows_by_matrix(rows, weight_OxI).reshape(*x.shape[:-1], -1)
    if rows.shape[0] == 1 and calls.possible() and weight_OxI.shape[0] % _CPU_SPLITS == 0:
        # XLA multiplies one row by a matrix on a single core. As a batch of products it uses them all, and reads memory at full speed.
        split_CxOxI = weight_OxI.reshape(_CPU_SPLITS, -1, weight_OxI.shape[1])
        repeated_CxRxI = jnp.broadcast_to(rows, (_CPU_SPLITS, *rows.shape))
        return ops.einsum("cri,coi->cro", repeated_CxRxI, split_CxOxI, **kwargs).reshape(*x.shape[:-1], -1)
    return ops.einsum("ri,oi->ro", rows, weight_OxI, **kwargs).reshape(*x.shape[:-1], -1)


def _linear_quantized(x: jax.Array, weight_OxI: Quantized, preferred_element_type: jnp.dtype | None = None) -> jax.Array:
    dtype = preferred_element_type or x.dtype
    weight, x = quantized.keep_in_loop(weight_OxI, x)
    rows, groups = math.prod(x.shape[:-1]), weight.scale.shape[-1]
    # On a mesh devices would send each other the products of all groups, where groups are split.
    if groups > 1 and (rows * groups > _MOST_GROUP_ROWS or calls.on_mesh.value):
        return linear(x, quantized.to_dense(weight, x.dtype), preferred_element_type=dtype)
    parts = quantized.split_by_group(x, groups)  # [B, T, G, I]
    product = linear(parts, weight.codes.astype(x.dtype), preferred_element_type=jnp.float32)  # [B, T, G, O]
    return jnp.sum(product * weight.scale.T.astype(jnp.float32), axis=-2).astype(dtype)


def _reads_codes(rows: int, codes: Codes | Integers | None) -> bool:
    """Whether `linear` multiplies so many rows by the codes."""
    return calls.possible() if isinstance(codes, Integers) else cpu_codes.usable(rows, codes)


def _reads_matrix(rows: int, weight: jax.Array | Quantized) -> bool:
    """Whether `linear` multiplies so many rows by a weight without codes with the CPU kernel."""
    return not isinstance(weight, Quantized) and cpu_rows.usable(rows, weight)


def rms_norm(x: jax.Array, scale_D: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square norm over the last axis (Zhang & Sennrich 2019); statistics in float32, result in x's dtype."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return normed.astype(x.dtype) * scale_D


class Block(nn.Module):
    """One pre-norm transformer block: attention, then a SwiGLU MLP, each added to the residual stream.

    Every weight names its logical axes here, beside its shape; `model/sharding.py` maps them to the mesh.
    """

    config: ModelConfig
    param_dtype: jnp.dtype = jnp.float32

    def _weight(self, name: str, init: nn.initializers.Initializer, **axes: int) -> jax.Array:
        return self.param(name, nn.with_logical_partitioning(init, tuple(axes)), tuple(axes.values()), self.param_dtype)

    def _linear(self, x: jax.Array, axis: dict[str, int], **outputs: dict[str, int]) -> list[jax.Array]:
        """X times several weights, which are given with their axis of outputs; `axis` is that of their inputs."""
        matrix = nn.initializers.normal(stddev=self.config.hidden_size**-0.5)
        weights = [self._weight(name, matrix, **of_weight, **axis) for name, of_weight in outputs.items()]
        codes = self.get_variable("params", _CODES, {})
        together, rows = codes.get(_joined(outputs)), math.prod(x.shape[:-1])
        if _reads_codes(rows, together):  # as one product: each has its price, however small
            product = linear(x, weights[0], together)
        elif not any(name in codes for name in outputs) and all(_reads_matrix(rows, weight) for weight in weights):
            product = cpu_rows.rows_by_matrix(x.reshape(rows, -1), *weights).reshape(*x.shape[:-1], -1)
        else:
            return [linear(x, weight, codes.get(name)) for name, weight in zip(outputs, weights, strict=True)]
        ends = itertools.accumulate(weight.shape[0] for weight in weights[:-1])
        return jnp.split(product, list(ends), axis=-1)

    @nn.compact
    def __call__(
        self,
        x_BxTxD: jax.Array,
        rot: rope.Rotation,
        cached_k: jax.Array | None,
        cached_v: jax.Array | None,
        start_B: jax.Array,
        mask_TxT: jax.Array | None,
        window: jax.Array | int | None,
        offset_T: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns the residual stream [B, T, D] and this pass's keys [B, K, H, T] and values [B, K, T, H].

        Args:
          x_BxTxD: the residual stream before the block.
          rot: of `ops.rotation`.
          cached_k, cached_v, start_B: as in `ops.cached_attention`; None, None and zeros where nothing came before.
          mask_TxT, window, offset_T: as in `ops.Visible`.
        """
        c = self.config
        x = x_BxTxD
        ones, zeros = nn.initializers.ones, nn.initializers.zeros
        embed, mlp, head_dim = {"embed": c.hidden_size}, {"mlp": c.intermediate_size}, {"head_dim": c.head_dim}
        # Heads and their channels are one axis: XLA multiplies by matrices as they lie, but copies anything with more axes first.
        heads, kv_heads = {"heads": c.num_heads * c.head_dim}, {"kv_heads": c.num_kv_heads * c.head_dim}

        h = rms_norm(x, self._weight("attn_norm", ones, **embed), c.norm_eps)
        q, k, v = self._linear(h, embed, wq=heads, wk=kv_heads, wv=kv_heads)
        if c.qkv_bias:
            q += self._weight("bq", zeros, **heads)
            k += self._weight("bk", zeros, **kv_heads)
            v += self._weight("bv", zeros, **kv_heads)
        q, k, v = (y.reshape(*y.shape[:2], -1, c.head_dim) for y in (q, k, v))  # [B, T, N or K, H]
        if c.qk_norm:
            q = rms_norm(q, self._weight("q_norm", ones, **head_dim), c.norm_eps)
            k = rms_norm(k, self._weight("k_norm", ones, **head_dim), c.norm_eps)
        q, k = rope.rotate(q, rot) * c.head_dim**-0.5, rope.rotate(k, rot)
        k, v = k.transpose(0, 2, 3, 1), v.swapaxes(1, 2)  # [B, K, H, T], [B, K, T, H]
        visible = ops.Visible(mask_TxT, window, offset_T)
        if cached_k is None:
            attended = ops.attention(q, k, v, visible)
        else:
            attended = ops.cached_attention(q, k, v, cached_k, cached_v, start_B, visible)
        (out,) = self._linear(attended.reshape(*x.shape[:2], -1), heads, wo=embed)
        if c.out_bias:
            out += self._weight("bo", zeros, **embed)
        x = x + out

        h = rms_norm(x, self._weight("mlp_norm", ones, **embed), c.norm_eps)
        gate, up = self._linear(h, embed, w_gate=mlp, w_up=mlp)
        if c.mlp_bias:
            gate += self._weight("b_gate", zeros, **mlp)
            up += self._weight("b_up", zeros, **mlp)
        (out,) = self._linear(nn.silu(gate) * up, mlp, w_down=embed)
        if c.mlp_bias:
            out += self._weight("b_down", zeros, **embed)
        return x + out, k, v


def embed(params: Params, tokens_BxT: jax.Array) -> jax.Array:
    """Token embeddings [B, T, D] in the dtype of the arithmetic."""
    return quantized.take_rows(params["embed"], tokens_BxT, params["final_norm"].dtype)


def forward_blocks(
    config: ModelConfig,
    blocks: tuple[Params, ...],
    x_BxTxD: jax.Array,
    start_B: jax.Array,
    cache: KVCache | None,
    layers: range,
    tree: Tree | None = None,
) -> tuple[jax.Array, KVCache]:
    """Runs the blocks `layers` over T new tokens of every row, unrolled: the way of decoding.

    Slicing stacked params inside a loop reads and writes every weight once more, so each block's params are arrays of their own.

    Args:
      blocks: params of ALL blocks, a tuple of length L.
      x_BxTxD: the residual stream before the first of `layers`.
      start_B: int32 [B], how many tokens each row already has in the cache; the new ones stand at positions start_b + t.
      cache: all blocks' caches, read only; None where nothing came before (start must then be 0).
      layers: which blocks to run, in order.
      tree: which of the new tokens follow which; None: each the one before.

    Returns:
      The residual stream after the last of `layers` [B, T, D], and the new keys and values of those blocks (tuples of len(layers)).
    """
    offset_T = jnp.arange(x_BxTxD.shape[1]) if tree is None else jnp.asarray(tree.offsets)
    rot = ops.rotation(config, start_B, offset_T)
    of_tree = (None, None) if tree is None else (jnp.asarray(tree.mask), offset_T)
    # Blocks with the same window are traced once; inlined, they make the same program as without this jit.
    run_block = jax.jit(Block(config).apply, static_argnums=7, inline=True)
    keys, values = [], []
    x = x_BxTxD
    for layer in layers:
        cached = (None, None) if cache is None else (cache.k[layer], cache.v[layer])
        x, k, v = run_block({"params": blocks[layer]}, x, rot, *cached, start_B, of_tree[0], config.windows[layer], of_tree[1])
        keys.append(k)
        values.append(v)
    return x, KVCache(tuple(keys), tuple(values))


def scan_blocks(
    config: ModelConfig, stacked: Params, x_BxTxD: jax.Array, positions_BxT: jax.Array, mask_BxTxT: jax.Array, *, first: int = 0
) -> jax.Array:
    """Runs blocks over whole sequences with `lax.scan`, without a cache: the way of training (one compiled block, whatever the depth).

    Args:
      stacked: block params with a leading layers axis, of blocks that follow each other.
      x_BxTxD: the residual stream before the first block.
      positions_BxT: int32 [B, T], position of each token within its own text (packed rows restart at 0).
      mask_BxTxT: bool [B, T, T] or [T, T], which tokens see which.
      first: which block of the model the first of `stacked` is.

    Returns:
      The residual stream after the last block, [B, T, D].
    """
    rot = rope.rotation(config.rope, config.head_dim, positions_BxT)
    start_B = jnp.zeros(x_BxTxD.shape[0], jnp.int32)
    num_layers = jax.tree.leaves(stacked)[0].shape[0]
    windows = config.windows[first : first + num_layers]
    windowed = any(window is not None for window in windows)
    # No sequence is longer than the context, so a window of that length hides nothing.
    windows_L = jnp.array([window or config.context_length for window in windows])
    block = Block(config)

    def step(x: jax.Array, layer: tuple[Params, jax.Array]) -> tuple[jax.Array, None]:
        params, window = layer
        x, _, _ = block.apply({"params": params}, x, rot, None, None, start_B, mask_BxTxT, window if windowed else None)
        return x, None

    return jax.lax.scan(step, x_BxTxD, (stacked, windows_L))[0]


def stack_blocks(blocks: tuple[Params, ...]) -> Params:
    """Per-block params to one pytree with a leading layers axis, for `scan_blocks`."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)


def last_hidden(config: ModelConfig, params: Params, x_BxTxD: jax.Array) -> jax.Array:
    """Final norm of the residual stream after the last block, [B, T, D]: what the LM head reads."""
    return rms_norm(x_BxTxD, params["final_norm"], config.norm_eps)


def logits(config: ModelConfig, params: Params, x_BxTxD: jax.Array) -> jax.Array:
    """Final norm and LM head: float32 logits [B, T, V] of the residual stream after the last block."""
    h = last_hidden(config, params, x_BxTxD)
    head_VxD = params["embed"] if config.tie_embeddings else params["lm_head"]
    return linear(h, head_VxD, params.get(_HEAD_CODES), preferred_element_type=jnp.float32)


def with_codes(params: Params, codes: dict[str, Any] | None) -> Params:
    """Params that decode: the same weights, with those codes beside them.

    Args:
      codes: {"head": Codes, "blocks": ({name: Codes}, ...)}, where any may be missing, or integers in their place, with names of weights
        or as `join_codes` makes them; None for params as they are.
    """
    if codes is None:
        return params
    blocks = tuple(block_with_codes(block, of_block) for block, of_block in zip(params["blocks"], codes["blocks"], strict=True))
    return params | {"blocks": blocks, _HEAD_CODES: codes.get("head")}


def block_with_codes(block: Params, codes: dict[str, Codes | Integers]) -> Params:
    """A block's params with codes beside them."""
    return block | {_CODES: codes}


def weights_read(params: Params) -> Params:
    """Params of a model or of a block as a pass over few tokens reads them: codes in place of what they stand for."""
    if "blocks" in params:
        head = {} if (codes := params.get(_HEAD_CODES)) is None else {"embed" if "lm_head" not in params else "lm_head": codes}
        rest = {name: value for name, value in params.items() if name != _HEAD_CODES}
        return rest | head | {"blocks": tuple(map(weights_read, params["blocks"]))}
    codes = params.get(_CODES, {})
    coded = {name for names in codes for name in names.split()}  # several may lie together
    return {name: weight for name, weight in params.items() if name != _CODES and name not in coded} | codes


def join_codes(codes: dict[str, Codes]) -> dict[str, Codes]:
    """Codes of a block's weights, where those that one input is multiplied by lie together, if they are of one kind."""
    for names in (("wq", "wk", "wv"), ("w_gate", "w_up")):
        parts = [codes.get(name) for name in names]
        if None not in parts and cpu_codes.same_kind(parts):
            codes = {name: of_name for name, of_name in codes.items() if name not in names} | {_joined(names): cpu_codes.concatenate(parts)}
    return codes


def _joined(names: Iterable[str]) -> str:
    return " ".join(names)


def init(config: ModelConfig, key: jax.Array, dtype: jnp.dtype = jnp.float32) -> Params:
    """Random params; every leaf is boxed with its logical axes (`nn.LogicallyPartitioned`; `nn.meta.unbox` takes the box off).

    `jax.eval_shape` of this function is the single definition of names, shapes and axes that loading and sharding follow.
    """
    embed_key, head_key, *block_keys = jax.random.split(key, config.num_layers + 2)
    block = Block(config, param_dtype=dtype)
    x = jnp.zeros((1, 1, config.hidden_size), dtype)
    zero = jnp.zeros(1, jnp.int32)
    rot = rope.rotation(config.rope, config.head_dim, zero[:, None])

    @jax.jit  # so that blocks, which are all alike, are traced once
    def init_block(block_key: jax.Array) -> Params:
        return block.init(block_key, x, rot, None, None, zero, None, None)["params"]

    def table(table_key: jax.Array) -> nn.LogicallyPartitioned:
        # Unit-variance logits from a normed hidden state.
        weights = jax.random.normal(table_key, (config.vocab_size, config.hidden_size), dtype) * config.hidden_size**-0.5
        return nn.LogicallyPartitioned(weights, ("vocab", "embed"))

    params = {
        "embed": table(embed_key),
        "blocks": tuple(init_block(block_key) for block_key in block_keys),
        "final_norm": nn.LogicallyPartitioned(jnp.ones(config.hidden_size, dtype), ("embed",)),
    }
    if not config.tie_embeddings:
        params["lm_head"] = table(head_key)
    return params
