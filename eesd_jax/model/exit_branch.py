"""The exit branch: one transformer block, a norm and an LM head behind the first N blocks of the target (EESD, section 3).

It is the only thing that is ever trained, saved or shipped. Its head may score a part of the vocabulary only (the draft vocabulary): the
target still scores every token, so this costs acceptance and never correctness.

Beyond the paper, a branch may have a second input (as EAGLE's, Li et al. 2024): the target's last hidden state of the token before, which
verification has computed, or in its place what the branch itself gave out where that token is a draft. Even N = 0 is then a branch.

Axes: B batch, T tokens, D hidden, V vocabulary of the target, Q draft vocabulary.
"""

import dataclasses
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from eesd_jax.errors import UserError
from eesd_jax.model import llama, ops, sharding, stored
from eesd_jax.model.cache import KVCache
from eesd_jax.model.config import ModelConfig
from eesd_jax.model.stored import Stored, Weight
from eesd_jax.model.tree import Tree

STARTS = ("last", "next", "zero")


class Fusion(NamedTuple):
    """What makes one input of two. norm: [D], of the hidden state after block N. weight: [D, 2 D]."""

    norm: jax.Array
    weight: Weight


class ExitBranch(NamedTuple):
    """The branch's weights, in the dtype of the target's, and the tokens that it can draft.

    block: params of one `llama.Block`. norm: [D]. head: [Q, D]. draft_ids: int32 [Q], the target's id of each row of the head.
    fusion: of a branch with the second input.
    """

    block: llama.Params
    norm: jax.Array
    head: Weight
    draft_ids: jax.Array
    fusion: Fusion | None = None


def with_codes(branch: ExitBranch) -> ExitBranch:
    """Puts beside a branch's matrices codes of 8 bits, where these stand for the very numbers, as in a folder that stores them so."""

    def beside(weight: jax.Array) -> Weight:
        codes = stored.of_bytes(weight)
        return weight if codes is None else Stored(weight, ops.pack_codes(codes))

    # Apart from each other: where only keys and values are used, no queries are computed.
    block = {name: beside(weight) if weight.ndim == 2 else weight for name, weight in branch.block.items()}
    fusion = branch.fusion and branch.fusion._replace(weight=beside(branch.fusion.weight))
    return branch._replace(block=block, fusion=fusion, head=beside(branch.head))


def init_exit_branch(
    config: ModelConfig,
    params: llama.Params,
    exit_layer: int,
    start: str,
    draft_ids: np.ndarray | None = None,
    *,
    deep_input: bool = False,
) -> ExitBranch:
    """A branch made from the target's own weights; it is never quantised itself, as it is to learn.

    Args:
      params: of the target.
      exit_layer: N, how many of the target's blocks draft; 1 <= N < L, or 0 with the second input.
      start: `last`: a copy of the target's last block (as in the paper). `next`: a copy of block N+1, which follows the exit in the target.
        `zero`: block N+1 with its outputs zeroed, so that the branch begins as a logit lens (the target's head on the hidden state).
      draft_ids: int32 [Q], increasing ids of the draft vocabulary; None for the whole vocabulary.
      deep_input: whether it has the second input; it begins as the sum of both.

    Raises:
      UserError: an exit layer or a start that there is not, or a draft vocabulary that is none.
    """
    check_exit_layer(config, exit_layer, deep_input=deep_input)
    if start not in STARTS:
        raise UserError(f"start of the exit branch is {start!r}; expected one of {', '.join(STARTS)}")
    dtype = params["final_norm"].dtype
    of_target = params["blocks"][-1 if start == "last" else exit_layer]
    block = {name: stored.to_dense(weight, dtype) for name, weight in of_target.items()}
    if start == "zero":
        block |= {name: jnp.zeros_like(block[name]) for name in ("wo", "bo", "w_down", "b_down") if name in block}
    draft_ids = np.arange(config.vocab_size) if draft_ids is None else np.asarray(draft_ids)
    check_draft_ids(config, draft_ids)
    head_VxD = params["embed"] if config.tie_embeddings else params["lm_head"]
    whole = draft_ids.size == config.vocab_size
    head = stored.to_dense(head_VxD, dtype) if whole else stored.take_rows(head_VxD, draft_ids, dtype)
    fusion = None
    if deep_input:
        both = np.tile(np.eye(config.hidden_size), 2)
        fusion = Fusion(jnp.ones_like(params["final_norm"]), jnp.asarray(both, dtype))
    return ExitBranch(block, params["final_norm"], head, jnp.asarray(draft_ids, jnp.int32), fusion)


def check_exit_layer(config: ModelConfig, exit_layer: int, *, deep_input: bool = False) -> None:
    """Raises UserError where blocks do not remain on both sides of the exit; before it none need be where there is a second input."""
    least = 0 if deep_input else 1
    if not least <= exit_layer < config.num_layers:
        raise UserError(
            f"exit_layer is {exit_layer}; expected {least} to {config.num_layers - 1} for a model of {config.num_layers} blocks"
        )


def check_draft_ids(config: ModelConfig, draft_ids: np.ndarray) -> None:
    """Raises UserError where ids [Q] are not increasing ids of the vocabulary: verification takes V of them for the vocabulary itself."""
    wanted = f"expected increasing ids from 0 to {config.vocab_size - 1}"
    if draft_ids.ndim != 1 or draft_ids.size == 0 or not np.issubdtype(draft_ids.dtype, np.integer):
        raise UserError(f"draft vocabulary has shape {list(draft_ids.shape)} and dtype {draft_ids.dtype}; {wanted}")
    outside = draft_ids[(draft_ids < 0) | (draft_ids >= config.vocab_size)]
    if outside.size:
        raise UserError(f"draft vocabulary has id {outside[0]}; {wanted}")
    (falls,) = np.nonzero(draft_ids[1:] <= draft_ids[:-1])
    if falls.size:
        raise UserError(f"draft vocabulary has id {draft_ids[falls[0] + 1]} behind id {draft_ids[falls[0]]}; {wanted}")


def _as_model(config: ModelConfig, draft_vocab_size: int) -> ModelConfig:
    """The branch seen as a model of one block, whose vocabulary is the draft vocabulary."""
    return dataclasses.replace(config, num_layers=1, windows=config.windows[-1:], vocab_size=draft_vocab_size, tie_embeddings=False)


def abstract_exit_branch(config: ModelConfig, draft_vocab_size: int, *, deep_input: bool = False) -> ExitBranch:
    """The shape of every weight of a branch for that target (`jax.ShapeDtypeStruct`); nothing is allocated."""
    params = nn.meta.unbox(sharding.abstract_params(_as_model(config, draft_vocab_size)))
    ids, norm = jax.ShapeDtypeStruct((draft_vocab_size,), jnp.int32), params["final_norm"]
    both = jax.ShapeDtypeStruct((config.hidden_size, 2 * config.hidden_size), norm.dtype)
    return ExitBranch(params["blocks"][0], norm, params["lm_head"], ids, Fusion(norm, both) if deep_input else None)


def exit_branch_shardings(config: ModelConfig, draft_vocab_size: int, mesh: Mesh, *, deep_input: bool = False) -> ExitBranch:
    """`NamedSharding` of every weight of a branch, by the same table as the target's."""
    params = sharding.param_shardings(_as_model(config, draft_vocab_size), mesh)
    norm, everywhere = params["final_norm"], NamedSharding(mesh, PartitionSpec())
    # Its inputs are split as the hidden axis of every other weight.
    fusion = Fusion(norm, NamedSharding(mesh, PartitionSpec(None, *norm.spec))) if deep_input else None
    return ExitBranch(params["blocks"][0], norm, params["lm_head"], everywhere, fusion)


def fuse(config: ModelConfig, branch: ExitBranch, h_BxTxD: jax.Array, deep_BxTxD: jax.Array | None) -> jax.Array:
    """What the exit block runs on, [B, T, D].

    Args:
      h_BxTxD: behind block N.
      deep_BxTxD: of each token the normed last hidden state of the one before, as `before` gives it; not looked at by a branch without
        the second input.
    """
    if branch.fusion is None:
        return h_BxTxD
    norm, weight = branch.fusion
    return ops.linear(jnp.concatenate([llama.rms_norm(h_BxTxD, norm, config.norm_eps), deep_BxTxD], axis=-1), weight)


def before(first_BxD: jax.Array, deep_BxTxD: jax.Array, tree: Tree | None = None) -> jax.Array:
    """Of each token that of the one before: [B, T, D], where `first_BxD` is of the one before all of them."""
    if tree is None:
        return jnp.concatenate([first_BxD[:, None], deep_BxTxD[:, :-1]], axis=1)
    return jnp.concatenate([first_BxD[:, None], deep_BxTxD], axis=1)[:, np.array(tree.parents) + 1]


def run_exit_block(
    config: ModelConfig, branch: ExitBranch, h_BxTxD: jax.Array, start_B: jax.Array, cache: KVCache | None, tree: Tree | None = None
) -> tuple[jax.Array, KVCache]:
    """Runs the exit block on T tokens; where only the keys and values are used, only they are computed.

    Args:
      h_BxTxD: of `fuse`.
      start_B: int32 [B], position of each row's first token.
      cache: the exit block's own (a tuple of one), read only; None where nothing came before.
      tree: which of the tokens follow which; None: each the one before.

    Returns:
      The residual stream behind the exit block [B, T, D], and the block's new keys and values.
    """
    offset_T = jnp.arange(h_BxTxD.shape[1]) if tree is None else jnp.asarray(tree.offsets)
    rot = ops.rotation(config, h_BxTxD, start_B, offset_T)
    cached = (None, None) if cache is None else (cache.k[0], cache.v[0])
    mask = None if tree is None else jnp.asarray(tree.mask)
    block = llama.Block(config)
    x, k, v = block.apply({"params": branch.block}, h_BxTxD, rot, *cached, start_B, mask, config.windows[-1], offset_T)
    return x, KVCache((k,), (v,))


def draft_output(config: ModelConfig, branch: ExitBranch, x_BxTxD: jax.Array) -> jax.Array:
    """The branch's norm [B, T, D]: what its head reads, and what stands for the target's last hidden state where a draft is run."""
    return llama.rms_norm(x_BxTxD, branch.norm, config.norm_eps)


def draft_logits(branch: ExitBranch, output_BxTxD: jax.Array) -> jax.Array:
    """The branch's head on `draft_output`: float32 logits over the draft vocabulary, [B, T, Q]."""
    return ops.linear(output_BxTxD, branch.head, preferred_element_type=jnp.float32)
