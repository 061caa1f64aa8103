"""What training and decoding need of machines that are not there: the real programs, compiled for a named TPU slice and read.

The arguments are shapes with shardings, so nothing is allocated and no weights are needed. The training step is the trainer's, over the
trainer's mesh; the decode programs are the engine's, with the target's weights over the `tensor` axis of all chips. Not in it: evaluation
(a smaller step without gradients), the input pipeline, and links between slices.

Axes: B rows, T tokens, P padded prompt.
"""

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from eesd_jax import control, engine, hlo
from eesd_jax.config import BranchConfig, ControllerConfig, DecodeConfig, DraftConfig, ExperimentConfig
from eesd_jax.control import ControllerSpec
from eesd_jax.decode.controllers import Calibration
from eesd_jax.decode.sampling import Sampling
from eesd_jax.distill import step, teacher
from eesd_jax.distill.checks import check_against_model
from eesd_jax.distill.data import Batch
from eesd_jax.distill.layout import make_layout
from eesd_jax.distill.loss import TopTokens
from eesd_jax.model import cpu_calls, exit_branch, llama, sharding
from eesd_jax.model.config import ModelConfig
from eesd_jax.slices import Slice

DISTILL = "distill step"


class DoesNotFit(Exception):
    """A program needs more memory than the chip has; the message says how much."""


class Program(NamedTuple):
    """What was compiled.

    compiled: for one chip of the slice. arguments: shapes with shardings. held: the arrays that are there while it runs, by kind:
    arguments, each once, and what else the process keeps. tokens: that one run of it takes or makes, at least.
    """

    name: str
    compiled: jax.stages.Compiled
    arguments: Any
    held: dict[str, Any]
    tokens: int


class Memory(NamedTuple):
    """Bytes of one chip.

    held: by kind, see `Program`. padding: of arguments, to whole tiles. output: beyond what takes an argument's place.
    """

    held: dict[str, int]
    padding: int
    temporaries: int
    output: int
    code: int

    @property
    def total(self) -> int:
        return sum(self.held.values()) + self.padding + self.temporaries + self.output + self.code


class Times(NamedTuple):
    """Seconds that one run takes a chip at least, by what it would wait for if it waited for nothing else."""

    compute: float
    memory: float
    links: float

    @property
    def step(self) -> float:
        return max(self)


def _placed(shape: Any, home: Any, dtype: jnp.dtype | None = None) -> Any:
    """Shapes with shardings, leaf by leaf."""
    return jax.tree.map(lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype, sharding=at), shape, home)


def abstract_params(config: ModelConfig, dtype: jnp.dtype, mesh: Mesh) -> llama.Params:
    """The target's weights as `load_model` would place them."""
    return _placed(nn.meta.unbox(sharding.abstract_params(config)), sharding.param_shardings(config, mesh), dtype)


def _abstract_branch(config: ModelConfig, settings: BranchConfig, dtype: jnp.dtype, mesh: Mesh) -> exit_branch.ExitBranch:
    drafts, deep = settings.draft_vocab or config.vocab_size, settings.deep_input
    branch = exit_branch.abstract_exit_branch(config, drafts, deep_input=deep)
    homes = exit_branch.exit_branch_shardings(config, drafts, mesh, deep_input=deep)
    return _placed(branch, homes, dtype)._replace(draft_ids=_placed(branch.draft_ids, homes.draft_ids))


def _abstract_trunk(config: ModelConfig, params: llama.Params, exit_layer: int) -> teacher.Trunk:
    """What `teacher.split_trunk` makes of the params."""

    def stack(blocks: tuple[llama.Params, ...]) -> llama.Params:
        if not blocks:
            return {}
        shapes = jax.eval_shape(llama.stack_blocks, blocks)
        return _placed(shapes, jax.tree.map(lambda leaf: teacher.stacked_home(leaf.sharding), blocks[0]))

    head = params["embed"] if config.tie_embeddings else params["lm_head"]
    blocks = params["blocks"]
    return teacher.Trunk(params["embed"], stack(blocks[:exit_layer]), stack(blocks[exit_layer:]), params["final_norm"], head)


def compile_distill(config: ExperimentConfig, model: ModelConfig, devices: Sequence[jax.Device]) -> Program:
    """The training step of an experiment, over all those devices.

    Raises:
      UserError: a mesh or a batch that does not fit the devices, or an experiment that does not fit the model.
      DoesNotFit: it needs more memory than a chip has.
    """
    check_against_model(config, model)
    layout = make_layout(config, devices)
    mesh, dtype, rows, length = layout.mesh, jnp.dtype(config.dtype or "bfloat16"), config.batch_size, config.data.sequence_length
    step_config = step.StepConfig.of(config, model, layout)
    params = abstract_params(model, dtype, mesh)
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
    frozen = step.Frozen(trunk, branch.head, branch.draft_ids)
    with cpu_calls.on_mesh(True):
        lowered = step.jit_step(state).lower(step_config, frozen, state, batch, features)
    tied, whole = model.tie_embeddings, branch.draft_ids.size == model.vocab_size
    held = {
        "weights": (trunk._replace(head=None) if tied else trunk, None if whole else branch.head, branch.draft_ids),
        "trained branch": state.trained,
        "optimizer state": (state.step, state.optimizer),
        "batch": (batch, features),
        # Behind the step, while it is written.
        "copy for the checkpoint": state,
    }
    return Program(DISTILL, _compile(DISTILL, lowered), (frozen, state, batch, features), held, rows * length)


def _abstract_state(config: step.StepConfig, branch: exit_branch.ExitBranch, mesh: Mesh, *, train_head: bool) -> step.TrainState:
    """What `step.init_state` makes of a branch."""
    trained = step.Trained(branch.block, branch.norm, branch.fusion, branch.head if train_head else None)
    trained = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=leaf.sharding), trained)
    homes = step.state_shardings(config, trained, mesh)
    optimizer = _placed(jax.eval_shape(config.make_optimizer().init, trained), homes.optimizer)
    return step.TrainState(jax.ShapeDtypeStruct((), jnp.int32, sharding=homes.step), trained, optimizer)


class DecodeShape(NamedTuple):
    """What is decoded: rows, tokens of the prompt and of the answer at most, drafts in a round at most, and what decides how many."""

    batch: int
    prompt_tokens: int
    max_new_tokens: int
    max_draft: int
    controller: ControllerSpec


def compile_decode(config: ExperimentConfig, model: ModelConfig, devices: Sequence[jax.Device], shape: DecodeShape) -> Iterator[Program]:
    """Prefill, a plain step, and a round of EESD, as the engine runs them; weights over the `tensor` axis of all devices.

    Raises:
      UserError: an exit layer that there is not, or a controller that needs measured times.
      DoesNotFit: one of them needs more memory than a chip has.
    """
    controller = control.build_controller(shape.controller, ControllerConfig(), Calibration(), None)
    exit_branch.check_exit_layer(model, config.branch.exit_layer, deep_input=config.branch.deep_input)
    mesh, dtype, rows = sharding.make_mesh(list(devices), tensor=len(devices)), jnp.dtype(config.dtype or "bfloat16"), shape.batch
    params = abstract_params(model, dtype, mesh)
    branch = _abstract_branch(model, config.branch, dtype, mesh)
    draft, options = DraftConfig(config.branch.exit_layer, shape.max_draft), DecodeConfig()
    longest = min(shape.prompt_tokens + shape.max_new_tokens, model.context_length) + shape.max_draft + 1
    padded, capacity = engine.bucket_shapes(options, shape.prompt_tokens, longest)

    def ints(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    def floats() -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows,), jnp.float32)

    keys = jax.eval_shape(jax.vmap(jax.random.key), jax.ShapeDtypeStruct((rows,), jnp.uint32))
    sampling = Sampling(floats(), ints(rows), floats(), floats())

    def compile(name: str, function: jax.stages.Wrapped, *arguments: Any, **static: Any) -> tuple[jax.stages.Compiled, Any]:
        with cpu_calls.on_mesh(True):
            lowered = function.lower(*arguments, **static)
        compiled = _compile(name, lowered)
        return compiled, _placed(lowered.out_info, compiled.output_shardings)

    weights = {"weights": params, "exit branch": branch}
    arguments = (model, params, branch, ints(rows, padded), ints(rows), ints(rows), keys)
    static = {"exit_layer": draft.exit_layer, "capacity": capacity, "chunk": options.prompt_buckets[-1]}
    compiled, (state, exits) = compile("prefill", engine._prefill, *arguments, **static)
    yield Program("prefill", compiled, arguments, weights, rows * padded)

    eos, steps = ints(1), ints()
    arguments = (model, eos, params, sampling, state, steps)
    compiled, _ = compile("plain step", engine._decode_plain, *arguments)
    yield Program("plain step", compiled, arguments, weights | {"caches": state.cache, "other state": state._replace(cache=None)}, rows)

    _, state = compile("start of drafting", engine._start_drafting, state, exits, controller=controller)
    arguments = (model, draft, controller, eos, params, branch, sampling, state, steps)
    compiled, _ = compile("EESD round", engine._decode_speculative, *arguments)
    others = state._replace(cache=None, draft=state.draft._replace(exit_cache=None))
    held = weights | {"caches": (state.cache, state.draft.exit_cache), "other state": others}
    yield Program("EESD round", compiled, arguments, held, rows)


def compile_programs(config: ExperimentConfig, model: ModelConfig, where: Slice, shape: DecodeShape, what: str) -> Iterator[Program]:
    """What is asked for, compiled one after the other: `distill`, `decode`, or `all` of it."""
    if what in ("distill", "all"):
        yield compile_distill(config, model, where.devices)
    if what in ("decode", "all"):
        yield from compile_decode(config, model, where.devices, shape)


def _compile(name: str, lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if found := re.search(r"Used (\S+) of (\S+) hbm", str(error)):
            raise DoesNotFit(f"{name} needs {found[1]}iB of a chip's memory, of which {found[2]}iB can be used") from None
        raise


def memory(program: Program) -> Memory:
    """What a chip holds while the program runs."""
    held = {kind: sum(map(bytes_of_a_chip, jax.tree.leaves(arrays))) for kind, arrays in program.held.items()}
    stats = program.compiled.memory_analysis()
    arguments = [leaf for leaf in jax.tree.leaves(program.arguments) if isinstance(leaf, jax.ShapeDtypeStruct)]
    return Memory(
        held,
        max(0, stats.argument_size_in_bytes - sum(map(bytes_of_a_chip, arguments))),  # those that are not used are held, but not counted
        stats.temp_size_in_bytes,
        stats.output_size_in_bytes - stats.alias_size_in_bytes,
        stats.generated_code_size_in_bytes,
    )


def bytes_of_a_chip(leaf: jax.ShapeDtypeStruct) -> int:
    """Bytes of an array that lie on one chip, without padding."""
    shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape
    return math.prod(shape) * leaf.dtype.itemsize


def times(cost: hlo.Cost, where: Slice) -> Times:
    """The roofline (Williams et al. 2009) of a program on a chip of that slice; no rate is ever reached in full."""
    chip = where.chip
    traffic = sum(cost.collectives.values())
    links = where.links * chip.link
    return Times(cost.flops / chip.flops, cost.bytes / chip.bandwidth, traffic / links if traffic else 0.0)


def find_problem(program: Program, where: Slice) -> str | None:
    """One line, where what the process holds beside the program's own leaves it no room."""
    needed, there = memory(program).total, where.chip.memory
    return f"{program.name} needs {_gib(needed)} GiB of a chip's memory, which is {_gib(there)} GiB" if needed > there else None


def describe(program: Program, where: Slice, tokens: float) -> dict[str, str]:
    """What to show of a program, by row: its memory and, of training on that many tokens, what it does and how long that takes.

    Of decoding, products of single rows are not matrix products in the HLO, so that its times would be wrong.
    """
    needs = memory(program)
    rows = {f"{kind}, GiB a chip": _gib(size) for kind, size in needs.held.items()}
    rows |= {
        "temporaries, GiB a chip": _gib(needs.temporaries),
        "output, padding and code, GiB a chip": _gib(needs.output + needs.padding + needs.code),
        "**total, GiB a chip**": f"**{_gib(needs.total)}** of {_gib(where.chip.memory)}",
    }
    if program.name != DISTILL:
        return rows
    cost = hlo.cost(program.compiled.as_text())
    least = times(cost, where)
    rows |= {
        "matrix products, TFLOP a chip": f"{cost.flops / 1e12:.4g}",
        "memory traffic, GB a chip": f"{cost.bytes / 1e9:.4g}",
    }
    rows |= {f"{kind}, GB a chip": f"{sent / 1e9:.4g}" for kind, sent in sorted(cost.collectives.items())}
    rows |= {f"{name}, ms at least": f"{1e3 * seconds:.4g}" for name, seconds in least._asdict().items()}
    rows["**one run, ms at least**"] = f"**{1e3 * least.step:.4g}** ({max(least._asdict(), key=least._asdict().get)})"
    rows["tokens a second, at most"] = f"{program.tokens / least.step:,.0f}"
    hours = tokens / program.tokens * least.step / 3600
    rows[f"hours for {tokens / 1e6:,.0f} M tokens, at least"] = f"{hours:.4g}"
    rows["chip-hours, at least"] = f"{hours * len(where.devices):.4g}"
    return rows


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f}"
