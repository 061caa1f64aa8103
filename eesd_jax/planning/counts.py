"""Counts what decode programs do at least: arithmetic, and bytes read, from the arrays that they work on.

A pass reads each weight and cache once, whatever the compiler does. (The HLO says little here: for single rows XLA does not multiply by
matrix products.) Caches are counted whole, as attention reads them, since masks hide what is not valid. Sampling, embeddings of single
tokens, and the exit block's keys and values in verification are not counted. What programs compile to is left to `hlo.py`.

All figures are for one chip. Axes: B rows, T tokens of a pass, N blocks that draft.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from eesd_jax.model import llama
from eesd_jax.model.cache import KVCache
from eesd_jax.model.config import ModelConfig
from eesd_jax.model.exit_branch import ExitBranch
from eesd_jax.model.stored import Quantized
from eesd_jax.planning.hlo import Cost


class Decoding(NamedTuple):
    """Shapes with shardings of the arrays that decoding works on. rows: B. exit_layer: N. exit_cache: of the exit block."""

    model: ModelConfig
    params: llama.Params
    branch: ExitBranch
    cache: KVCache
    exit_cache: KVCache
    rows: int
    exit_layer: int


def elements_of_a_chip(leaf: jax.ShapeDtypeStruct) -> int:
    """Counts the elements of an array that lie on one chip, without padding."""
    return math.prod(leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape)


def bytes_of_a_chip(tree: Any) -> int:
    """Counts the bytes of arrays that lie on one chip, without padding."""
    # Two codes of 4 bits share a byte of a device; NumPy, which gives the item size, gives each its own.
    return sum(elements_of_a_chip(leaf) * (4 if leaf.dtype == jnp.int4 else 8 * leaf.dtype.itemsize) for leaf in jax.tree.leaves(tree)) // 8


def prefill(decoding: Decoding, length: int, passes: int) -> Cost:
    """Counts prefill: so many passes of `length` tokens of every row, without the attention within a pass."""
    caches = (decoding.cache, decoding.exit_cache)
    once = _blocks(decoding, range(decoding.model.num_layers), length, reads_cache=passes > 1)
    return once.times(passes) + Cost(0.0, bytes_of_a_chip(caches), {}, 0)


def plain_step(decoding: Decoding) -> Cost:
    """Counts a plain step: one token of every row through the whole model."""
    return _blocks(decoding, range(decoding.model.num_layers), 1) + _head(decoding, 1)


def eesd_round(decoding: Decoding, drafts: int, width: int) -> Cost:
    """Counts a round: blocks 1..N on the last token and on every draft, the branch for every draft, and verification of that width."""
    early, late = range(decoding.exit_layer), range(decoding.exit_layer, decoding.model.num_layers)
    branch = decoding.branch._replace(draft_ids=None)
    draft = _pass(decoding, branch, decoding.exit_cache, 1)
    verification = _blocks(decoding, late, width) + _head(decoding, width)
    return _blocks(decoding, early, 1).times(drafts + 1) + draft.times(drafts) + verification


def _blocks(decoding: Decoding, layers: range, length: int, *, reads_cache: bool = True) -> Cost:
    blocks = decoding.params["blocks"][layers.start : layers.stop]
    caches = jax.tree.map(lambda leaves: leaves[layers.start : layers.stop], decoding.cache, is_leaf=lambda node: type(node) is tuple)
    return _pass(decoding, blocks, caches if reads_cache else (), length)


def _head(decoding: Decoding, length: int) -> Cost:
    params = decoding.params
    head = params["embed"] if decoding.model.tie_embeddings else params["lm_head"]
    return _pass(decoding, (params["final_norm"], head), (), length)


def _pass(decoding: Decoding, weights: Any, caches: Any, length: int) -> Cost:
    """Counts a pass: `length` tokens of every row times all matrices among the weights, and their queries times the caches."""
    tokens = decoding.rows * length
    queries = length * decoding.model.num_heads // decoding.model.num_kv_heads  # that each entry of a cache meets
    stored = jax.tree.leaves(weights, is_leaf=lambda node: isinstance(node, Quantized))
    matrices = [leaf.codes if isinstance(leaf, Quantized) else leaf for leaf in stored if len(leaf.shape) == 2]
    products = tokens * sum(map(elements_of_a_chip, matrices)) + queries * sum(map(elements_of_a_chip, jax.tree.leaves(caches)))
    return Cost(2.0 * products, bytes_of_a_chip((weights, caches)), {}, 0)
