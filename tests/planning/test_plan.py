"""`train/plan.py` and what it is made of: memory by kind, and that what is planned is what would run.

All of it on eight virtual CPU devices; compiling for a TPU is one slow test, where libtpu is installed.
"""

import dataclasses
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import commands
import jax
import jax.numpy as jnp
import pytest
from commands import ROOT, assert_refused
from experiments import make_config, write_dataset

from eesd_jax.cluster.hardware import Chip
from eesd_jax.config import DecodeConfig, DraftConfig, MeshConfig
from eesd_jax.decode.controllers import Calibration, parse_controller
from eesd_jax.distill import experiment, layout, trainer
from eesd_jax.engine.drafter import Drafter
from eesd_jax.engine.engine import Engine
from eesd_jax.errors import UserError
from eesd_jax.model import exit_branch, sharding
from eesd_jax.planning import counts, estimates, hlo, needs, programs, recommend, slices
from eesd_jax.weights import known, load

# What is planned is what would run ------------------------------------------------------------------------------------------------------


def small(tmp_path: pathlib.Path, **changes):
    config = make_config(str(tmp_path / "dataset"), tmp_path / "run", mesh=MeshConfig(1, 4, 2), batch_size=8, dtype="float32")
    return dataclasses.replace(config, **changes)


def places(tree) -> list:
    """Shape, dtype and home of every array."""
    return [(leaf.shape, leaf.dtype, leaf.sharding.devices_indices_map(leaf.shape)) for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize(("draft_vocab", "train_head"), [(0, False), (56, True)])
def test_the_step_is_the_trainers(tmp_path, draft_vocab, train_head):
    """Every argument has the shape, dtype and place that a run gives it, and the program is the run's."""
    config = small(tmp_path)
    config = dataclasses.replace(config, branch=dataclasses.replace(config.branch, draft_vocab=draft_vocab, train_head=train_head))
    write_dataset(tmp_path / "dataset")
    planned = programs.compile_distill(config, known.find_config("tiny"), jax.devices())
    where = layout.make_layout(config)
    run = trainer.Run(config, tmp_path, where, load.load_model("tiny", jnp.float32, where.mesh))
    item = next(run.read_ahead(run.new_loader(), None, 1))
    real = trainer.step.jit_step(run.initial).lower(run.step_config, run.frozen, run.initial, item.batch, item.features)
    frozen, state, batch, _ = planned.arguments
    assert places(frozen) == places(run.frozen)
    assert places(state) == places(run.initial)
    assert places(batch) == places(item.batch)
    assert planned.tokens == item.batch.tokens.size
    assert hlo.cost(planned.compiled.as_text()) == hlo.cost(real.compile().as_text())


def test_memory_by_kind_is_what_xla_is_given(tmp_path):
    """With neither shared nor unused arrays (but for the rows' numbers), kinds add up to the arguments; the checkpoint is a copy."""
    config = small(tmp_path)
    config = dataclasses.replace(config, branch=dataclasses.replace(config.branch, draft_vocab=56))
    program = programs.compile_distill(config, known.find_config("tiny"), jax.devices())
    stats, found = program.compiled.memory_analysis(), needs.memory(program)
    numbers_of_rows = 4 * config.batch_size // 4  # int32, over data x fsdp
    copy = found.held["copy for the checkpoint"]
    assert sum(found.held.values()) - copy - numbers_of_rows == stats.argument_size_in_bytes
    assert copy == found.held["trained branch"] + found.held["optimizer state"]
    assert found.total == sum(found.held.values()) + stats.temp_size_in_bytes + found.output + found.code
    assert found.output < copy / 10  # the new state takes the old one's place


def test_rows_stay_apart(tmp_path):
    """Weights are gathered, activations are not summed: what the chips send does not grow with the rows."""

    def sent(batch_size: int) -> float:
        config = small(tmp_path, mesh=MeshConfig(1, 8, 1), batch_size=batch_size)
        program = programs.compile_distill(config, known.find_config("tiny"), jax.devices())
        return sum(hlo.cost(program.compiled.as_text()).collectives.values())

    assert sent(64) < 1.5 * sent(8)


@pytest.fixture(scope="module")
def engine() -> Engine:
    mesh = sharding.make_mesh(tensor=8)
    model = load.load_model("tiny", jnp.float32, mesh)
    branch = exit_branch.init_exit_branch(model.config, model.params, 2, "next")
    homes = exit_branch.exit_branch_shardings(model.config, branch.draft_ids.size, mesh)
    branch = jax.tree.map(jax.device_put, branch, homes)
    return Engine(model, DecodeConfig(), Drafter(branch, DraftConfig(2, 3), Calibration(), trained=False))


def test_decode_programs_are_the_engines(engine, tmp_path):
    shape = programs.DecodeShape(2, 9, 20, 3, parse_controller("beta", 3))
    config = small(tmp_path)
    prefill, plain, eesd_round = programs.compile_decode(config, engine.model.config, jax.devices(), shape)
    assert [prefill.name, plain.name, eesd_round.name] == ["prefill", "plain step", "EESD round"]
    prompts, controller = [list(range(9))] * 2, engine.controller("beta")
    for program, chosen, place in ((plain, None, 4), (eesd_round, controller, 1)):
        state = engine.prefill(prompts, [0, 1], 2, 20, chosen)
        assert places(program.arguments[place]) == places(state)
    spec = eesd_round.arguments[0]
    assert places(spec.params) == places(engine.params)
    assert places(spec.branch) == places(engine.branch)
    # A round verifies and drafts in a loop, so each further draft costs the blocks that draft.
    costs = [hlo.cost(eesd_round.compiled.as_text(), (1, drafts)) for drafts in (1, 2, 3)]
    assert costs[1].flops - costs[0].flops == costs[2].flops - costs[1].flops > 0
    assert costs[0].flops > hlo.cost(plain.compiled.as_text()).flops


# By arithmetic --------------------------------------------------------------------------------------------------------------------------


def decode_shape(batch: int = 2) -> programs.DecodeShape:
    return programs.DecodeShape(batch, 9, 20, 3, parse_controller("beta", 3))


def test_a_step_reads_weights_and_caches_once(tmp_path):
    """And multiplies each row by every matrix but the embedding, and each query by the caches."""
    model = known.find_config("tiny")
    on = programs.decoding(small(tmp_path), model, sharding.make_mesh(), decode_shape())
    weights = on.params if model.tie_embeddings else on.params | {"embed": None}
    cost = counts.plain_step(on)
    assert cost.bytes == sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((weights, on.cache)))
    matrices = sum(leaf.size for leaf in jax.tree.leaves(weights) if leaf.ndim == 2)
    cached = sum(leaf.size for leaf in jax.tree.leaves(on.cache))
    assert cost.flops == 2 * (on.rows * matrices + model.num_heads // model.num_kv_heads * cached)


def test_a_round_without_drafts_is_a_plain_step(tmp_path):
    """Each draft then costs the blocks that draft and the branch; what verification costs more is arithmetic alone."""
    on = programs.decoding(small(tmp_path), known.find_config("tiny"), sharding.make_mesh(), decode_shape())
    assert counts.eesd_round(on, 0, 1) == counts.plain_step(on)
    costs = [counts.eesd_round(on, drafts, 4) for drafts in (1, 2, 3)]
    assert costs[1].bytes - costs[0].bytes == costs[2].bytes - costs[1].bytes > 0
    assert counts.eesd_round(on, 1, 9).bytes == costs[0].bytes
    assert counts.eesd_round(on, 1, 9).flops > costs[0].flops


def test_decoding_is_known_without_a_compiler(tmp_path):
    """Arrays over a mesh of no devices are those that the engine has, and so is what it reads of them."""
    config, model = small(tmp_path), known.find_config("tiny")
    node = slices.find_slice("h100:8")
    compiled = [needs.need(program) for program in programs.compile_decode(config, model, jax.devices(), decode_shape())]
    for ours, theirs in zip(estimates.estimate_decode(config, model, node, decode_shape()), compiled, strict=True):
        assert ours.name == theirs.name
        for kind in ("weights", "exit branch"):
            assert ours.memory.held[kind] == theirs.memory.held[kind]
        for our_run, their_run in zip(ours.runs, theirs.runs, strict=True):
            assert (our_run.name, our_run.tokens) == (their_run.name, their_run.tokens)
            assert our_run.cost.flops == pytest.approx(their_run.cost.flops, rel=0.2)
            assert our_run.cost.collectives["all-reduce"] == pytest.approx(their_run.cost.collectives["all-reduce"], rel=0.3)


def test_a_training_step_is_known_without_a_compiler(tmp_path):
    """What is held is what the compiler is given; arithmetic is what the HLO has."""
    config, model = small(tmp_path, mesh=MeshConfig(2, 4, 1)), known.find_config("tiny")
    ours = estimates.estimate_distill(config, model, slices.find_slice("h100:8"))
    theirs = needs.need(programs.compile_distill(config, model, jax.devices()))
    assert ours.memory.held == theirs.memory.held
    assert ours.runs[0].tokens == theirs.runs[0].tokens
    assert ours.runs[0].cost.flops == pytest.approx(theirs.runs[0].cost.flops, rel=0.1)
    assert sum(ours.runs[0].cost.collectives.values()) == pytest.approx(sum(theirs.runs[0].cost.collectives.values()), rel=1.0)


def fake_planner(fits: dict[str, bool], asked: list[tuple[str, MeshConfig]]) -> recommend.Planner:
    """Says of each slice that a program needs a byte, or that it does not fit."""

    def planner(config, model, where, shape, what):
        asked.append((where.name, config.mesh))
        if not fits.get(where.name, True):
            raise programs.DoesNotFit("too small")
        yield needs.Need(programs.DISTILL, needs.Memory({}, 0, 1, 0, 0), (needs.Run("", 1, hlo.Cost(1.0, 1.0, {}, 0)),))

    return planner


def test_the_smallest_slice_that_fits(tmp_path):
    """Smallest first, each family until one fits; what cannot fit is not compiled for, nor what no mesh divides."""
    config = dataclasses.replace(small(tmp_path), dtype="bfloat16", mesh=MeshConfig(-1, 1, 1), batch_size=8)
    model, asked = known.find_config("meta-llama/Llama-2-13b-chat-hf"), []

    def tried(families: tuple[str, ...], fits: dict[str, bool]) -> dict[str, str | None]:
        planner = fake_planner(fits, asked)
        found = list(recommend.try_slices(config, model, families, decode_shape(), "distill", planner=planner))
        assert [one.where.chips for one in found] == sorted(one.where.chips for one in found)
        return {one.where.name: one.problem for one in found}

    verdicts = tried(("v5e", "v5p"), {})
    assert "not compiled" in verdicts.pop("v5e:1x1")
    assert verdicts == {"v5e:2x2": None, "v5p:2x2x1": None}
    assert {name for name, _ in asked} == set(verdicts)
    verdicts = tried(("v5e",), dict.fromkeys(slices.offered("v5e"), False))
    assert "batch of 8 rows" in verdicts["v5e:4x4"]


def test_where_the_compiler_disagrees_the_smallest_mesh_is_tried(tmp_path):
    config = dataclasses.replace(small(tmp_path), mesh=MeshConfig(-1, 1, 1), batch_size=8)
    asked = []
    tried = list(
        recommend.try_slices(
            config, known.find_config("tiny"), ("h100",), decode_shape(), "distill", planner=fake_planner({"h100:1": False}, asked)
        )
    )
    assert [one.problem for one in tried] == ["too small", None]
    splits = recommend.splits(config, known.find_config("tiny"), slices.find_slice("h100:8"))
    assert [(split.mesh.data, split.mesh.fsdp) for split in splits] == [(8, 1), (4, 2), (2, 4), (1, 8)]
    totals = [split.need.memory.total for split in splits]
    assert totals[-1] == min(totals)


# Models, slices, and the command --------------------------------------------------------------------------------------------------------


def test_shapes_need_no_weights(tmp_path):
    config = known.find_config("meta-llama/Llama-3.1-70B-Instruct")
    assert (config.num_layers, config.head_dim, config.rope.kind) == (80, 128, "llama3")
    # A folder is read, whatever it is called.
    (tmp_path / "config.json").write_text(json.dumps(known.CONFIGS["meta-llama/Llama-2-13b-chat-hf"] | {"num_hidden_layers": 3}))
    assert known.find_config(str(tmp_path)).num_layers == 3
    with pytest.raises(UserError, match="nobody/nothing"):
        known.find_config("nobody/nothing")


@pytest.mark.parametrize(("name", "count"), [("llama8b", 8.03e9), ("llama13b", 13.02e9), ("llama70b", 70.55e9)])
def test_configs_are_of_the_models_that_they_name(name, count):
    """They can be read, fit their model, and the model has the weights that its name says."""
    sys.path.insert(0, str(ROOT))
    try:
        config = experiment.to_dataclass(importlib.import_module(f"configs.{name}").get_config(), name)
    finally:
        sys.path.remove(str(ROOT))
    model = known.find_config(config.model)
    programs.check_against_model(config, model)
    params = programs.abstract_params(model, jnp.dtype(config.dtype), sharding.make_mesh())
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == pytest.approx(count, rel=2e-3)


@pytest.mark.parametrize(
    ("topology", "links"),
    [("v6e:1x1", 0), ("v5p:2x2x1", 2), ("v6e:2x4", 2), ("v5e:16x16", 4), ("v5p:2x2x4", 3), ("v5p:4x4x8", 6), ("h100:8", 1)],
)
def test_links_of_a_chip(topology, links):
    assert slices.links_of(slices.parse_topology(topology)) == links


@pytest.fixture(scope="module")
def command():
    with commands.loaded("train/plan.py") as module:
        yield module


@pytest.fixture
def run(command, monkeypatch):
    """Runs the command in this process, on a slice of these eight devices with chips of a given memory."""

    def run(*arguments: str, memory: float | None = 2**30) -> commands.Result:
        with monkeypatch.context() as patch:
            for name in command.ENVIRONMENT:
                patch.setenv(name, os.environ.get(name, ""))  # so that they are taken back
            if memory is not None:
                patch.setattr(slices, "find_slice", lambda name, count: slices.Slice(name, 1, 8, Chip(1e12, memory, 1e11, 1e10), 2))
                patch.setattr(slices, "find_devices", lambda where: jax.devices())
            return commands.run(command, f"--config={ROOT}/configs/tiny.py", *arguments)

    return run


def test_the_table(run):
    result = run("--topology=v5e:2x4", "--what=all", "--tokens=1e9", "--prompt_tokens=9", "--max_new_tokens=20", "--max_draft=2")
    assert (result.code, result.err) == (0, "")
    for text in ("distill step", "prefill", "plain step", "EESD round", "weights, GiB a chip", "all-reduce, GB a chip", "1,000 M tokens"):
        assert text in result.out
    assert "with 1 draft " in result.out
    assert "with 2 drafts " in result.out
    assert "arithmetic" not in result.out


def test_gpus_are_planned_for_by_arithmetic(run):
    result = run("--topology=h100:4", "--what=all", "--prompt_tokens=9", "--max_new_tokens=20", "--meshes", memory=None)
    assert (result.code, result.err) == (0, "")
    assert result.out.count("By arithmetic, not compiled.") == 2
    assert "2 x 2 x 1" in result.out
    assert "of 80.00" in result.out


def test_a_recommendation(run):
    result = run("--recommend=h100,a100", "--config.batch_size=8", memory=None)
    assert (result.code, result.err) == (0, "")
    assert "Smallest that fits: h100:1, with --config.mesh.data=1 --config.mesh.fsdp=1" in result.out
    assert "GPUs: By arithmetic, not compiled." in result.out


def test_arithmetic_needs_no_libtpu(run, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "libtpu" else find_spec(name, *rest))
    arguments = ["--nocompile", "--what=all", "--prompt_tokens=9", "--max_new_tokens=20", "--config.batch_size=16"]
    result = run("--topology=v5e:2x4", *arguments, memory=None)
    assert (result.code, result.err) == (0, "")
    assert result.out.endswith("By arithmetic, not compiled.\n")
    result = run("--recommend=v6e", *arguments, memory=None)
    assert (result.code, result.err) == (0, "")
    assert "Smallest that fits: v6e:1x1" in result.out


def test_no_slice_is_large_enough(run):
    result = run("--recommend=h100", "--what=decode", "--batch_size=1000000", memory=None)
    assert result.code == 1
    assert result.err.count("\n") == 1
    assert "h100" in result.err


def test_what_does_not_fit(run):
    result = run("--topology=v5e:2x4", memory=2**20)
    assert result.code == 1
    assert "of 0.00" in result.out
    assert result.err.count("\n") == 1
    assert "distill step needs" in result.err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--topology=v5p:2x2"], ["'v5p:2x2'", "expected", "v5p:AxBxC"]),
        (["--topology=h100:9"], ["'h100:9'", "expected", "h100:N", "1 to 8"]),
        (["--topology=p100:8"], ["'p100:8'", "expected"]),
        ([], ["--topology is missing"]),
        (["--topology=v5e:2x2", "--recommend=v5e"], ["'v5e:2x2'", "--recommend"]),
        (["--recommend=v5e,v9"], ["'v9'", "v5e"]),
        (["--topology=h100:8", "--slices=2", "--config.mesh.fsdp=16", "--config.batch_size=16"], ["fsdp 16", "multiple of 2"]),
        (["--topology=v5e:2x2", "--slices=0"], ["--slices is 0"]),
        (["--topology=v5e:2x2", "--max_draft=0"], ["--max_draft is 0"]),
        (["--topology=v5e:2x2", "--controller=cost_aware"], ["'cost_aware'", "expected"]),
        (["--topology=v5e:2x2", "--what=nothing"], ["'nothing'", "distill"]),
        (["--topology=v5e:2x2", "--tokens=0"], ["--tokens is 0"]),
    ],
)
def test_mistakes(run, arguments, named):
    assert_refused(run(*arguments, memory=None), *named)


def test_without_libtpu(run, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "libtpu" else find_spec(name, *rest))
    assert_refused(run("--topology=v5e:2x2", memory=None), "libtpu", "pip install")


def test_a_mesh_of_another_size(run):
    assert_refused(run("--topology=v5e:2x4", "--config.mesh.fsdp=3"), "fsdp 3", "8")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_for_a_tpu():
    arguments = ["--topology=v5e:2x2", "--what=all", "--prompt_tokens=9", "--max_new_tokens=20"]
    command = [sys.executable, str(ROOT / "train" / "plan.py"), f"--config={ROOT}/configs/tiny.py", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert (result.returncode, result.stderr) == (0, "")
    for name in ("of 16.00", "distill step", "prefill", "plain step", "EESD round"):
        assert name in result.stdout
