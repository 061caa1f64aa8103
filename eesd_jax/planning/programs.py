"""Compiles the real programs of training and decoding for a named TPU slice that is not there.

The arguments are shapes with shardings, so nothing is allocated and no weights are needed. The training step is the trainer's, over the
trainer's mesh; the decode programs are the engine's, with the target's weights over the `tensor` axis of all chips. Evaluation (a smaller
step without gradients) and the input pipeline are left out. Reading memory and cost from the programs is left to `needs.py`.

Axes: B rows, T tokens, P padded prompt.
"""

import functools
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from eesd_jax.config import NOT_QUANTIZED, BranchConfig, DecodeConfig, DraftConfig, ExperimentConfig
from eesd_jax.decode.controllers import Calibration, ControllerSpec, Setup, build_controller
from eesd_jax.decode.draft import Speculation
from eesd_jax.decode.sampling import Sampling
from eesd_jax.distill import step, teacher
from eesd_jax.distill.checks import check_against_model
from eesd_jax.distill.data import Batch
from eesd_jax.distill.layout import Layout, make_layout
from eesd_jax.distill.loss import TopTokens
from eesd_jax.engine import engine
from eesd_jax.engine.prefill import bucket_shapes
from eesd_jax.model import cache as kv
from eesd_jax.model import exit_branch, llama, ops, sharding, stored
from eesd_jax.model.config import ModelConfig
from eesd_jax.model.stored import Quantized
from eesd_jax.planning import counts, hlo
from eesd_jax.planning.counts import Decoding

DISTILL, PREFILL, PLAIN, ROUND = "distill step", "prefill", "plain step", "EESD round"


class DoesNotFit(Exception):
    """A program needs more memory than the chip has; the message says how much."""


class Run(NamedTuple):
    """A way in which a decode program runs.

    name: tells it from the program's other ways. tokens: taken, or made at most. work: counted by the arrays, see `planning/counts.py`.
    trips, chosen: its way through the HLO, see `hlo.Module.run`.
    """

    name: str
    tokens: int
    work: hlo.Cost
    trips: tuple[int, ...] = (1,)
    chosen: dict[int, int] | None = None


class Program(NamedTuple):
    """A compiled program.

    compiled: for one chip of the slice. arguments: shapes with shardings. held: the arrays that are there while it runs, by kind:
    arguments, each once, and what else the process keeps. tokens: taken or made by one run, at least. runs: of decoding.
    """

    name: str
    compiled: jax.stages.Compiled
    arguments: Any
    held: dict[str, Any]
    tokens: int
    runs: tuple[Run, ...] = ()


def _placed(shape: Any, home: Any, dtype: jnp.dtype | None = None) -> Any:
    """Gives shapes their shardings, leaf by leaf."""
    return jax.tree.map(lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype, sharding=at), shape, home)


def abstract_params(config: ModelConfig, dtype: jnp.dtype, mesh: Mesh, quantize: str = NOT_QUANTIZED) -> llama.Params:
    """Returns the target's weights as shapes, placed as `load_model` would place them."""

    def of(kind: str, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct | Quantized:
        return jax.ShapeDtypeStruct(leaf.shape, dtype) if kind == NOT_QUANTIZED else stored.shapes(leaf.shape, kind)

    abstract = nn.meta.unbox(sharding.abstract_params(config))
    shapes = jax.tree.map(of, stored.kinds(abstract, quantize), abstract)
    return _placed(shapes, sharding.param_shardings(config, mesh, quantize))


def _abstract_branch(config: ModelConfig, settings: BranchConfig, dtype: jnp.dtype, mesh: Mesh) -> exit_branch.ExitBranch:
    drafts, deep = settings.draft_vocab or config.vocab_size, settings.deep_input
    branch = exit_branch.abstract_exit_branch(config, drafts, deep_input=deep)
    homes = exit_branch.exit_branch_shardings(config, drafts, mesh, deep_input=deep)
    return _placed(branch, homes, dtype)._replace(draft_ids=_placed(branch.draft_ids, homes.draft_ids))


def _abstract_trunk(config: ModelConfig, params: llama.Params, exit_layer: int) -> teacher.Trunk:
    """Does to shapes what `teacher.split_trunk` does to the params."""

    def stack(blocks: tuple[llama.Params, ...]) -> llama.Params:
        if not blocks:
            return {}
        shapes = jax.eval_shape(llama.stack_blocks, blocks)
        return _placed(shapes, jax.tree.map(lambda leaf: teacher.stacked_home(leaf.sharding), blocks[0]))

    head = params["embed"] if config.tie_embeddings else params["lm_head"]
    blocks = params["blocks"]
    return teacher.Trunk(params["embed"], stack(blocks[:exit_layer]), stack(blocks[exit_layer:]), params["final_norm"], head)


class Training(NamedTuple):
    """The arguments of a training step. held: the arrays that are there while it runs, by kind."""

    config: step.StepConfig
    frozen: step.Frozen
    state: step.TrainState
    batch: Batch
    features: teacher.Features | None
    held: dict[str, Any]


def training(config: ExperimentConfig, model: ModelConfig, layout: Layout) -> Training:
    """Makes the arguments that the trainer gives its step, over a mesh that may have no devices (`jax.sharding.AbstractMesh`)."""
    mesh, dtype, rows, length = layout.mesh, jnp.dtype(config.dtype or "bfloat16"), config.batch_size, config.data.sequence_length
    step_config = step.StepConfig.of(config, model, layout)
    params = abstract_params(model, dtype, mesh, config.quantize)
    branch = _abstract_branch(model, config.branch, dtype, mesh)
    trunk = _abstract_trunk(model, params, config.branch.exit_layer)
    state = _abstract_state(step_config, branch, mesh, train_head=config.branch.train_head)

    def of_rows(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=layout.rows_home)

    text = of_rows(length)
    batch = Batch(text, text, text, of_rows(length, dtype=bool), of_rows())
    features = None
    if config.cache.enabled:
        hidden, kept = of_rows(length, model.hidden_size, dtype=config.cache.dtype), (length, config.cache.top_tokens)
        top = TopTokens(of_rows(*kept), of_rows(*kept, dtype=jnp.float32))
        features = teacher.Features(hidden, hidden if config.loss.regression or config.branch.deep_input else None, top)
    tied = model.tie_embeddings
    # Then the branch's head is the target's own; a quantised target's head is not shared.
    shared = branch.draft_ids.size == model.vocab_size and config.quantize == NOT_QUANTIZED
    held = {
        "weights": (trunk._replace(head=None) if tied else trunk, None if shared else branch.head, branch.draft_ids),
        "trained branch": state.trained,
        "optimizer state": (state.step, state.optimizer),
        "batch": (batch, features),
        # After the step, while it is written.
        "copy for the checkpoint": state,
    }
    return Training(step_config, step.Frozen(trunk, branch.head, branch.draft_ids), state, batch, features, held)


def compile_distill(config: ExperimentConfig, model: ModelConfig, devices: Sequence[jax.Device]) -> Program:
    """Compiles the training step of an experiment, over all those devices.

    Raises:
      UserError: a mesh or a batch that does not fit the devices, or an experiment that does not fit the model.
      DoesNotFit: it needs more memory than a chip has.
    """
    check_against_model(config, model)
    given = training(config, model, make_layout(config, devices))
    arguments = (given.frozen, given.state, given.batch, given.features)
    with ops.kernels_for(devices[0].platform):
        lowered = step.jit_step(given.state).lower(given.config, *arguments)
    return Program(DISTILL, _compile(DISTILL, lowered), arguments, given.held, given.batch.tokens.size)


def _abstract_state(config: step.StepConfig, branch: exit_branch.ExitBranch, mesh: Mesh, *, train_head: bool) -> step.TrainState:
    """Does to a branch's shapes what `step.init_state` does to a branch."""
    trained = step.Trained(branch.block, branch.norm, branch.fusion, branch.head if train_head else None)
    trained = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=leaf.sharding), trained)
    homes = step.state_shardings(config, trained, mesh)
    optimizer = _placed(jax.eval_shape(config.make_optimizer().init, trained), homes.optimizer)
    return step.TrainState(jax.ShapeDtypeStruct((), jnp.int32, sharding=homes.step), trained, optimizer)


class DecodeShape(NamedTuple):
    """The task to decode: rows, most tokens of a prompt and of an answer, most drafts in a round, and the controller."""

    batch: int
    prompt_tokens: int
    max_new_tokens: int
    max_draft: int
    controller: ControllerSpec


class Shapes(NamedTuple):
    """The engine's shapes for a `DecodeShape`. padded, capacity, chunk: tokens of a prompt, a cache, a pass of prefill."""

    draft: DraftConfig
    padded: int
    capacity: int
    chunk: int

    @property
    def passes(self) -> tuple[int, int]:
        """Returns the tokens of a pass of prefill, and the number of passes."""
        length = min(self.padded, self.chunk)
        return length, -(-self.padded // length)


def shapes(config: ExperimentConfig, model: ModelConfig, shape: DecodeShape) -> Shapes:
    """Finds the engine's shapes; raises UserError for an exit layer that does not exist."""
    exit_branch.check_exit_layer(model, config.branch.exit_layer, deep_input=config.branch.deep_input)
    options = DecodeConfig()
    longest = min(shape.prompt_tokens + shape.max_new_tokens, model.context_length) + shape.max_draft + 1
    padded, capacity = bucket_shapes(options, shape.prompt_tokens, longest)
    return Shapes(DraftConfig(config.branch.exit_layer, shape.max_draft), padded, capacity, options.prompt_buckets[-1])


def decoding(config: ExperimentConfig, model: ModelConfig, mesh: Mesh | AbstractMesh, shape: DecodeShape) -> Decoding:
    """Makes the arrays that decoding works on. Caches are split as the heads are; where that cannot be done evenly, not at all."""
    dtype, found = jnp.dtype(config.dtype or "bfloat16"), shapes(config, model, shape)
    heads = "tensor" if model.num_kv_heads % mesh.shape["tensor"] == 0 else None
    home = NamedSharding(mesh, PartitionSpec(None, heads))

    def caches(blocks: int) -> kv.KVCache:
        empty = jax.eval_shape(functools.partial(kv.empty, model, shape.batch, found.capacity, dtype, blocks))
        return _placed(empty, jax.tree.map(lambda _: home, empty))

    params = abstract_params(model, dtype, mesh, config.quantize)
    branch = _abstract_branch(model, config.branch, dtype, mesh)
    return Decoding(model, params, branch, caches(model.num_layers), caches(1), shape.batch, config.branch.exit_layer)


def runs_of(name: str, found: Shapes, on: Decoding) -> tuple[Run, ...]:
    """Lists the ways in which a decode program runs: rounds by their drafts."""
    if name == PREFILL:
        length, passes = found.passes
        return (Run("", on.rows * found.padded, counts.prefill(on, length, passes), (passes,)),)
    if name == PLAIN:
        return (Run("", on.rows, counts.plain_step(on)),)
    runs, widths = [], found.draft.widths
    for place, width in enumerate(widths):
        drafts = width - 1
        # The loop over rounds, that over drafts in it, and those of sampling.
        work, chosen = counts.eesd_round(on, drafts, width), {len(widths): place}
        runs.append(
            Run(f"{drafts} draft{'' if drafts == 1 else 's'}", on.rows * width, work, (1, drafts, 1), chosen if len(widths) > 2 else None)
        )
    return tuple(runs)


def compile_decode(config: ExperimentConfig, model: ModelConfig, devices: Sequence[jax.Device], shape: DecodeShape) -> Iterator[Program]:
    """Compiles prefill, a plain step, and a round of EESD, as the engine runs them; weights over the `tensor` axis of all devices.

    Raises:
      UserError: an exit layer that does not exist, or a controller that needs measured times.
      DoesNotFit: one of them needs more memory than a chip has.
    """
    controller = build_controller(shape.controller, Setup(calibration=Calibration()))
    found, rows = shapes(config, model, shape), shape.batch
    on = decoding(config, model, sharding.make_mesh(list(devices), tensor=len(devices)), shape)
    params, branch = on.params, on.branch

    def ints(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    def floats() -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows,), jnp.float32)

    keys = jax.eval_shape(jax.vmap(jax.random.key), jax.ShapeDtypeStruct((rows,), jnp.uint32))
    sampling = Sampling(floats(), ints(rows), floats(), floats())

    def compile(name: str, function: jax.stages.Wrapped, *arguments: Any, **static: Any) -> tuple[jax.stages.Compiled, Any]:
        with ops.kernels_for(devices[0].platform):
            lowered = function.lower(*arguments, **static)
        compiled = _compile(name, lowered)
        return compiled, _placed(lowered.out_info, compiled.output_shardings)

    weights = {"weights": params, "exit branch": branch}
    arguments = (model, params, branch, ints(rows, found.padded), ints(rows), ints(rows), keys)
    static = {"exit_layer": found.draft.exit_layer, "capacity": found.capacity, "chunk": found.chunk}
    compiled, (state, exits) = compile(PREFILL, engine._prefill, *arguments, **static)
    on = on._replace(cache=state.cache, exit_cache=exits.exit_cache)  # where they really lie
    yield Program(PREFILL, compiled, arguments, weights, rows * found.padded, runs_of(PREFILL, found, on))

    eos, steps = ints(1), ints()
    arguments = (model, eos, params, sampling, state, steps)
    compiled, _ = compile(PLAIN, engine._decode_plain, *arguments)
    held = weights | {"caches": state.cache, "other state": state._replace(cache=None)}
    yield Program(PLAIN, compiled, arguments, held, rows, runs_of(PLAIN, found, on))

    _, state = compile("start of drafting", engine._start_drafting, found.draft, branch, controller, state, exits)
    spec = Speculation(config=model, draft=found.draft, controller=controller, eos_ids=eos, params=params, branch=branch, sampling=sampling)
    arguments = (spec, state, steps)
    compiled, _ = compile(ROUND, engine._decode_speculative, *arguments)
    others = state._replace(cache=None, draft=state.draft._replace(exit_cache=None))
    held = weights | {"caches": (state.cache, state.draft.exit_cache), "other state": others}
    yield Program(ROUND, compiled, arguments, held, rows, runs_of(ROUND, found, on))


def compile_programs(
    config: ExperimentConfig, model: ModelConfig, devices: Sequence[jax.Device], shape: DecodeShape, what: str
) -> Iterator[Program]:
    """Compiles what is asked for, one program after the other: `distill`, `decode`, or `all` of it."""
    if what in ("distill", "all"):
        yield compile_distill(config, model, devices)
    if what in ("decode", "all"):
        yield from compile_decode(config, model, devices, shape)


def _compile(name: str, lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if found := re.search(r"Used (\S+) of (\S+) hbm", str(error)):
            raise DoesNotFit(f"{name} needs {found[1]}iB of a chip's memory, of which {found[2]}iB can be used") from None
        raise
