"""The exit branch: one transformer block, a norm and an LM head behind the first N blocks of the target (EESD, section 3).

It is the only thing that is ever trained, saved or shipped. Its head may score a part of the vocabulary only (the draft vocabulary): the
target still scores every token, so this costs acceptance and never correctness.

Axes: B batch, T tokens, D hidden, V vocabulary of the target, Q draft vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from eesd_jax.config import ModelConfig
from eesd_jax.errors import UserError
from eesd_jax.model import llama, rope
from eesd_jax.model.cache import KVCache


class ExitBranch(NamedTuple):
    """The branch's weights, in the dtype of the target's, and the tokens that it can draft.

    block: params of one `llama.Block`. norm: [D]. head: [Q, D]. draft_ids: int32 [Q], the target's id of each row of the head.
    """

    block: llama.Params
    norm: jax.Array
    head: jax.Array
    draft_ids: jax.Array


def init_exit_branch(
    config: ModelConfig, params: llama.Params, exit_layer: int, start: str, draft_ids: jax.Array | None = None
) -> ExitBranch:
    """A branch made from the target's own weights.

    Args:
      params: of the target.
      exit_layer: N, how many of the target's blocks draft; 1 <= N < L.
      start: `last`: a copy of the target's last block (as in the paper). `next`: a copy of block N+1, which follows the exit in the target.
        `zero`: block N+1 with its outputs zeroed, so that the branch begins as a logit lens (the target's head on the hidden state).
      draft_ids: int32 [Q], increasing ids of the draft vocabulary; None for the whole vocabulary.

    Raises:
      UserError: an exit layer or a start that there is not.
    """
    if not 1 <= exit_layer < config.num_layers:
        raise UserError(f"exit_layer is {exit_layer}; expected 1 to {config.num_layers - 1} for a model of {config.num_layers} blocks")
    if start not in ("last", "next", "zero"):
        raise UserError(f"start of the exit branch is {start!r}; expected last, next or zero")
    block = dict(params["blocks"][-1 if start == "last" else exit_layer])
    if start == "zero":
        block |= {name: jnp.zeros_like(block[name]) for name in ("wo", "bo", "w_down", "b_down") if name in block}
    draft_ids = jnp.arange(config.vocab_size, dtype=jnp.int32) if draft_ids is None else jnp.asarray(draft_ids, jnp.int32)
    head_VxD = params["embed"] if config.tie_embeddings else params["lm_head"]
    head = head_VxD if draft_ids.size == config.vocab_size else head_VxD[draft_ids]
    return ExitBranch(block, params["final_norm"], head, draft_ids)


def run_exit_block(
    config: ModelConfig, branch: ExitBranch, h_BxTxD: jax.Array, start_B: jax.Array, cache: KVCache | None
) -> tuple[jax.Array, KVCache]:
    """Runs the exit block on T hidden states of block N; where only the keys and values are used, only they are computed.

    Args:
      start_B: int32 [B], position of each row's first token.
      cache: the exit block's own (a tuple of one), read only; None where nothing came before.

    Returns:
      The residual stream behind the exit block [B, T, D], and the block's new keys and values.
    """
    length = h_BxTxD.shape[1]
    rot = rope.rotation(config.rope, config.head_dim, start_B[:, None] + jnp.arange(length))
    cached = (None, None) if cache is None else (cache.k[0], cache.v[0])
    block = llama.Block(config)
    x, k, v = block.apply({"params": branch.block}, h_BxTxD, rot, *cached, start_B, llama.causal_mask(length), config.windows[-1])
    return x, KVCache((k,), (v,))


def draft_logits(config: ModelConfig, branch: ExitBranch, x_BxTxD: jax.Array) -> jax.Array:
    """The branch's norm and head: float32 logits over the draft vocabulary, [B, T, Q]."""
    return llama.linear(llama.rms_norm(x_BxTxD, branch.norm, config.norm_eps), branch.head, preferred_element_type=jnp.float32)
