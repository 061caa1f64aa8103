"""Llama-family decoder blocks as pure functions of plain pytrees (Touvron et al. 2023; Mistral, Qwen2 and Qwen3 as variations).

One Linen `Block` serves decoding (`forward_blocks`: unrolled over a tuple of per-block params, with a cache) and training
(`scan_blocks`: `lax.scan` over stacked params, without one). Weights keep the [out, in] order of Hugging Face
files, so that loading changes nothing.

Axes: B batch, T tokens of this pass, S cache capacity, N query heads, K key/value heads, G = N/K, H head dim, D hidden, F mlp,
V vocabulary.

Params: {"embed": [V, D], "blocks": (block, ...), "final_norm": [D], "lm_head": [V, D] (absent when tied)}. A matrix may be `Quantized`, or
`Stored` with the codes of its file; the dtype of the arithmetic is that of the norms.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from eesd_jax.model import ops, rope, stored
from eesd_jax.model.cache import KVCache
from eesd_jax.model.config import ModelConfig
from eesd_jax.model.stored import Codes, Stored
from eesd_jax.model.tree import Tree

Params = dict[str, Any]

_TOGETHER = (("wq", "wk", "wv"), ("w_gate", "w_up"))  # weights of a block that one input is multiplied by


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
        return ops.linears(x, weights)

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
    return stored.take_rows(params["embed"], tokens_BxT, params["final_norm"].dtype)


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
    rot = ops.rotation(config, x_BxTxD, start_B, offset_T)
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
    return ops.linear(h, head_VxD, preferred_element_type=jnp.float32)


def with_codes(config: ModelConfig, params: Params, codes: dict[str, Any]) -> Params:
    """Puts beside weights the codes that stand for them (`Stored`), as this platform's kernels read them.

    Args:
      codes: {"head": Codes, "blocks": ({name: Codes}, ...)}, where any may be missing.
    """
    blocks = tuple(map(_block_with_codes, params["blocks"], codes["blocks"]))
    head = {} if "head" not in codes else {"embed" if config.tie_embeddings else "lm_head": codes["head"]}
    return params | {"blocks": blocks} | {name: Stored(params[name], ops.pack_codes(of_name)) for name, of_name in head.items()}


def _block_with_codes(block: Params, codes: dict[str, Codes]) -> Params:
    """Puts codes beside a block's weights; those that one input is multiplied by lie together, if they are of one kind."""
    weights, apart = {}, dict(codes)
    for names in _TOGETHER:
        parts = [codes.get(name) for name in names]
        if None not in parts and stored.same_kind(parts):
            joint = ops.pack_codes(stored.concatenate(parts))
            weights |= {name: Stored(block[name], None if i else joint) for i, name in enumerate(names)}
            apart = {name: of_name for name, of_name in apart.items() if name not in names}
    return block | weights | {name: Stored(block[name], ops.pack_codes(of_name)) for name, of_name in apart.items()}


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
