"""Estimates what programs need, by arithmetic: where there is no compiler (GPUs), or before it is asked.

The arrays are those that the compiler would be given, over a mesh of no devices, so what is held is exact. Temporaries and traffic count
only the tensors that cannot be avoided; docs/plan.md compares them with the compiler's.

Axes: B rows of a chip, T tokens, D hidden, F mlp, V vocabulary, Q draft vocabulary, N heads of a chip.
"""

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType

from eesd_jax.config import ExperimentConfig
from eesd_jax.distill import step
from eesd_jax.distill.checks import check_against_model
from eesd_jax.distill.layout import Layout, mesh_sizes
from eesd_jax.model import sharding
from eesd_jax.model.config import ModelConfig
from eesd_jax.planning import programs
from eesd_jax.planning.counts import Decoding, bytes_of_a_chip
from eesd_jax.planning.hlo import Cost
from eesd_jax.planning.needs import Memory, Need, Run
from eesd_jax.planning.programs import DISTILL, PLAIN, PREFILL, ROUND, DecodeShape
from eesd_jax.planning.slices import Slice


def _mesh(sizes: dict[str, int]) -> AbstractMesh:
    axes = sharding.MESH_AXES
    return AbstractMesh(tuple(sizes[axis] for axis in axes), axes, axis_types=(AxisType.Auto,) * len(axes))


def estimate_distill(config: ExperimentConfig, model: ModelConfig, where: Slice) -> Need:
    """Estimates a training step; raises UserError for a mesh or a batch that does not fit the chips."""
    check_against_model(config, model)
    sizes = mesh_sizes(config, where.chips, where.count)
    given = programs.training(config, model, Layout(_mesh(sizes), 0, 1))
    held = {kind: bytes_of_a_chip(arrays) for kind, arrays in given.held.items()}
    cost = _distill_cost(config, model, given, sizes)
    return Need(
        DISTILL, Memory(held, 0, _distill_temporaries(config, model, given, sizes), 0, 0), (Run("", given.batch.tokens.size, cost),)
    )


def _part(config: ExperimentConfig, sizes: dict[str, int]) -> int:
    """Counts the rows that a chip runs at once."""
    return config.batch_size // config.optimizer.accumulate // (sizes["data"] * sizes["fsdp"])


def _distill_temporaries(config: ExperimentConfig, model: ModelConfig, given: programs.Training, sizes: dict[str, int]) -> int:
    rows, length, tensor = _part(config, sizes), config.data.sequence_length, sizes["tensor"]
    width = jnp.dtype(config.dtype or "bfloat16").itemsize
    scores = rows * model.num_heads // tensor * length**2
    attention = scores * (4 + 4)  # in float32, and its gradient
    residual = rows * length * model.hidden_size * width
    mlp = 3 * rows * length * model.intermediate_size // tensor * width
    drafts = given.frozen.draft_ids.size
    logits = rows * min(config.loss.chunk, length) * (model.vocab_size + 2 * drafts) * 4 // tensor
    gathered = _whole_head_bytes(given, sizes) + _whole_bytes(given.state.trained.block, sizes, width) if sizes["fsdp"] > 1 else 0
    gradients = bytes_of_a_chip(given.state.trained)
    # The outputs of block N and of the last block, the stream, and its gradient live all along; the others one after the other.
    return 4 * residual + max(attention + mlp, 2 * logits) + gathered + gradients


def _distill_cost(config: ExperimentConfig, model: ModelConfig, given: programs.Training, sizes: dict[str, int]) -> Cost:
    length, fsdp, data, tensor = config.data.sequence_length, sizes["fsdp"], sizes["data"], sizes["tensor"]
    online, trains_head = not config.cache.enabled, config.branch.train_head
    width = jnp.dtype(config.dtype or "bfloat16").itemsize
    tokens = config.batch_size * length // (data * fsdp)  # of a chip, in all parts
    per_token = step.position_flops(model, given.frozen.draft_ids.size, online=online, train_head=trains_head)
    blocks = 3 + (model.num_layers if online else 0)  # the branch's, forward and backward, and the trunk's
    per_token += 4 * length * model.num_heads * model.head_dim * blocks
    trunk = given.frozen.trunk
    parts = config.optimizer.accumulate
    chunks = parts * -(-length // config.loss.chunk)
    # Every pass gathers the trunk's blocks and the branch's, the latter twice; every chunk of the loss the heads.
    gathered = parts * (_whole_bytes((trunk.early, trunk.late), sizes, width) if online else 0)
    gathered += 2 * parts * _whole_bytes(given.state.trained.block, sizes, width) + chunks * _whole_head_bytes(given, sizes)
    gradients = _whole_bytes(given.state.trained, sizes, 4)
    rows, hidden = _part(config, sizes), model.hidden_size
    collectives = {
        "all-gather": gathered * (fsdp - 1) / fsdp,
        "reduce-scatter": gradients * (fsdp - 1) / fsdp,
        "all-reduce": 2 * gradients / fsdp * (data - 1) / data,
    }
    if tensor > 1:  # activations, after attention and after the mlp
        collectives["all-reduce"] += 2 * blocks * parts * 2 * (tensor - 1) / tensor * rows * length * hidden * width
    # Weights as they are gathered, written and read; attention's scores, written once and read for their sum and for the product; the
    # optimizer's state.
    scores = parts * rows * model.num_heads // tensor * length**2 * 3 * 4
    moved = 2 * gathered + blocks * scores + 2 * bytes_of_a_chip(given.state)
    return Cost(per_token * tokens / tensor, float(moved), {kind: sent for kind, sent in collectives.items() if sent}, 0)


def _whole_bytes(tree: Any, sizes: dict[str, int], width: int) -> int:
    """Counts the bytes of a chip's weights once they are gathered over `fsdp`, at so many bytes an element."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree)) * width // sizes["tensor"]


def _whole_head_bytes(given: programs.Training, sizes: dict[str, int]) -> int:
    head = given.frozen.trunk.head
    drafted = head if given.features is None else None  # features from a cache come with the target's tokens
    return _whole_bytes((drafted, given.frozen.head), sizes, head.dtype.itemsize)


def estimate_decode(config: ExperimentConfig, model: ModelConfig, where: Slice, shape: DecodeShape) -> Iterator[Need]:
    """Estimates prefill, a plain step and a round; raises UserError for an exit layer that does not exist."""
    chips = where.chips
    on = programs.decoding(config, model, _mesh({"data": 1, "fsdp": 1, "tensor": chips}), shape)
    found = programs.shapes(config, model, shape)
    weights = {"weights": bytes_of_a_chip(on.params), "exit branch": bytes_of_a_chip(on.branch)}
    caches = {"caches": bytes_of_a_chip((on.cache, on.exit_cache))}
    for name in (PREFILL, PLAIN, ROUND):
        width = {PREFILL: found.passes[0], PLAIN: 1, ROUND: found.draft.max_draft + 1}[name]
        logits = 0 if name == PREFILL else 3 * shape.batch * width * model.vocab_size * 4
        temporaries = _pass_bytes(on, width, found.capacity, chips) + logits
        output = sum(caches.values()) if name == PREFILL else 0
        runs = tuple(
            Run(run.name, run.tokens, run.work._replace(collectives=_decode_traffic(on, name, run, found, chips)))
            for run in programs.runs_of(name, found, on)
        )
        yield Need(name, Memory(weights if name == PREFILL else weights | caches, 0, temporaries, output, 0), runs)


def _pass_bytes(on: Decoding, width: int, capacity: int, chips: int) -> int:
    """Counts the bytes of the activations of one block of a pass."""
    model, size = on.model, on.params["final_norm"].dtype.itemsize
    scores = on.rows * math.ceil(model.num_heads / chips) * width * (capacity + width) * (4 + 4 + size)
    return scores + on.rows * width * size * (4 * model.hidden_size + 3 * model.intermediate_size // chips)


def _decode_traffic(on: Decoding, name: str, run: programs.Run, found: programs.Shapes, chips: int) -> dict[str, float]:
    """Counts the bytes that a chip sends: two sums of activations a block, and the logits."""
    if chips == 1:
        return {}
    model, size = on.model, on.params["final_norm"].dtype.itemsize
    tokens = on.rows * found.padded if name == PREFILL else run.tokens
    blocks, logits = model.num_layers * tokens, 0 if name == PREFILL else tokens * model.vocab_size
    if name == ROUND:
        drafts = run.tokens // on.rows - 1
        blocks = on.rows * ((drafts + 1) * on.exit_layer + drafts) + (model.num_layers - on.exit_layer) * tokens
        logits += drafts * on.rows * on.branch.draft_ids.size
    share = (chips - 1) / chips
    return {"all-reduce": 2 * 2 * share * blocks * model.hidden_size * size, "all-gather": share * logits * 4}


def estimate(config: ExperimentConfig, model: ModelConfig, where: Slice, shape: DecodeShape, what: str) -> Iterator[Need]:
    """Estimates what is asked for: `distill`, `decode`, or `all` of it."""
    if what in ("distill", "all"):
        yield estimate_distill(config, model, where)
    if what in ("decode", "all"):
        yield from estimate_decode(config, model, where, shape)
