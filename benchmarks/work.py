"""Counts from shapes what the parts of a round read and compute, which measured times are compared with."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from eesd_jax.config import DraftConfig
from eesd_jax.model import llama, stored
from eesd_jax.model.config import ModelConfig
from eesd_jax.model.exit_branch import ExitBranch


class Work(NamedTuple):
    """The work of a part, once. bytes: of weights and of the valid part of caches. flops: of products and of attention."""

    bytes: int
    flops: int

    def least_seconds(self, bandwidth: float, flops: float = float("inf")) -> float:
        """Computes the least seconds on a machine that moves so many bytes, and does so many operations, a second."""
        return max(self.bytes / bandwidth, self.flops / flops)


def work_of_parts(
    config: ModelConfig, draft: DraftConfig, params: llama.Params, branch: ExitBranch, batch: int, context: int
) -> dict[Any, Work]:
    """Counts blocks 1..N on one token (`early`), the exit block with its head (`exit`), and verification (`verify`, width) of every width.

    Args:
      params, branch: arrays, or shapes of them (`jax.ShapeDtypeStruct`).
      batch: rows.
      context: tokens of each row that are in the caches.
    """

    def work(blocks: Sequence[llama.Params], rest: Any, matrices: Sequence[Any], caches: int, tokens: int) -> Work:
        weights = [weight for block in blocks for weight in stored.dense(block).values() if weight.ndim == 2]
        entries = sum(weight.size for weight in (*weights, *stored.dense(matrices)))
        leaves = jax.tree.leaves(stored.read((blocks, rest)))
        read = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
        of_cache = 2 * config.num_kv_heads * config.head_dim * context * params["final_norm"].dtype.itemsize
        attention = 4 * config.num_heads * config.head_dim * context * caches
        return Work(read + batch * caches * of_cache, batch * tokens * (2 * entries + attention))

    early, late = params["blocks"][: draft.exit_layer], params["blocks"][draft.exit_layer :]
    head = params["embed" if config.tie_embeddings else "lm_head"]
    # Verification writes the exit block's keys and values.
    keys = [branch.block[name] for name in ("wk", "wv")]
    works = {"early": work(early, (), (), len(early), 1), "exit": work([branch.block], (branch.norm, branch.head), [branch.head], 1, 1)}
    for width in draft.widths:
        tokens = width + (width - 1) * draft.others
        works["verify", width] = work(late, (params["final_norm"], head, keys), [head, *keys], len(late), tokens)
    return works


def least_round(works: dict[Any, Work], draft: DraftConfig, drafts: int, bandwidth: float, flops: float = float("inf")) -> float:
    """Computes the seconds of a round of so many drafts if each part took as little as it can."""
    early, exits, last = (works[name].least_seconds(bandwidth, flops) for name in ("early", "exit", ("verify", draft.width_of(drafts))))
    return (drafts + 1) * early + drafts * exits + last
