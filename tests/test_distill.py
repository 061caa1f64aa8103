"""Training through the real step and the real loop: the same on every mesh, from a cache, and however often it is stopped.

Most runs are in this process, on one of its eight devices; kills and several processes are in `test_distill_processes.py`.
"""

import dataclasses
import gc
import json
import os
import pathlib
import shutil
import signal
import struct
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import compiled
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from experiments import NUM_VALIDATION, make_config, write_dataset
from tensorboardX.proto import event_pb2

from eesd_jax import DecodeConfig, Engine, experiment
from eesd_jax.config import DraftConfig, ExperimentConfig, MeshConfig
from eesd_jax.decode.controllers import Calibration, Fixed
from eesd_jax.distill import data, evaluation, step, teacher, trainer
from eesd_jax.distill.checks import comparable
from eesd_jax.distill.layout import Layout, make_layout
from eesd_jax.distill.monitor import METRICS_NAME, Monitor
from eesd_jax.engine import Drafter
from eesd_jax.errors import UserError
from eesd_jax.model import cache as kv
from eesd_jax.model import cpu_calls, exit_branch, llama, sharding
from eesd_jax.weights import branch_folder
from eesd_jax.weights.checkpoint import Checkpoints
from eesd_jax.weights.load import LoadedModel, load_model

MESHES = {"data 8": (8, 1, 1), "data 4, fsdp 2": (4, 2, 1), "data 2, fsdp 2, tensor 2": (2, 2, 2)}
MORE_MESHES = {"data 4, tensor 2": (4, 1, 2), "fsdp 2, tensor 4": (1, 2, 4), "fsdp 8": (1, 8, 1), "tensor 8": (1, 1, 8)}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> str:
    return write_dataset(tmp_path_factory.mktemp("data") / "dataset")


@pytest.fixture
def config(dataset, tmp_path) -> ExperimentConfig:
    return make_config(dataset, tmp_path / "run")


@pytest.fixture
def on_one_device(monkeypatch) -> None:
    """Runs take the first device only."""
    monkeypatch.setattr(trainer, "make_layout", one_device)


def one_device(config: ExperimentConfig | None = None) -> Layout:
    del config
    return Layout(sharding.make_mesh(jax.devices()[:1]), 0, 1)


def prepare(config: ExperimentConfig, layout: Layout | None = None) -> trainer.Run:
    """A run that has loaded everything, but done nothing."""
    layout = layout or one_device()
    with cpu_calls.on_mesh(layout.mesh.size > 1):
        model = load_model(config.model, jnp.dtype("float32"), layout.mesh)
        return trainer.Run(config, epath.Path(config.output_dir), layout, model)


def first_batch(run: trainer.Run) -> data.Batch:
    return next(data.make_loader(run.rows, run.config.batch_size, run.config.seed, 0, 1))


def one_step(run: trainer.Run) -> tuple[step.TrainState, step.Metrics]:
    batch = run.layout.place(first_batch(run))
    with cpu_calls.on_mesh(run.layout.mesh.size > 1):
        state, metrics = run.compile_step()(run.initial, trainer.Input(batch, None, {}, 0))
    return jax.device_get(state), jax.device_get(metrics)


def assert_same_step(found: tuple, wanted: tuple) -> None:
    """Loss, gradients (AdamW's first moments hold them) and parameters within 1e-5, relative to the size of each."""
    for (path, leaf), right in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(wanted), strict=True):
        distance, size = np.linalg.norm(np.float64(leaf) - right), np.linalg.norm(np.float64(right))
        assert distance <= 1e-5 * size, f"{jax.tree_util.keystr(path)}: {distance / size}"


def read_metrics(config: ExperimentConfig) -> list[dict[str, Any]]:
    """The lines of a run, without what depends on the clock."""
    lines = (pathlib.Path(config.output_dir) / METRICS_NAME).read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name != "tokens_per_second"} for line in lines]


def exported(config: ExperimentConfig) -> bytes:
    return (pathlib.Path(config.output_dir) / "exit_branch" / branch_folder.TENSORS_NAME).read_bytes()


def files(config: ExperimentConfig) -> dict[str, tuple[int, bytes]]:
    paths = [path for path in pathlib.Path(config.output_dir).rglob("*") if path.is_file()]
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}


# A step ---------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixed(dataset, tmp_path_factory) -> ExperimentConfig:
    """All losses at once, a reduced draft vocabulary and a trained head."""
    config = make_config(dataset, tmp_path_factory.mktemp("mixed"), batch_size=8)
    weights = {"soft": 0.5, "reverse_kl": 0.25, "total_variation": 0.5, "hard": 0.25, "regression": 0.1}
    return dataclasses.replace(
        config,
        branch=dataclasses.replace(config.branch, draft_vocab=64, train_head=True),
        loss=dataclasses.replace(config.loss, **weights),
        optimizer=dataclasses.replace(config.optimizer, learning_rate=1e-3, warmup_steps=0, clip_norm=0.0),
    )


@pytest.fixture(scope="module")
def alone(mixed) -> tuple[step.TrainState, step.Metrics]:
    """The step of one device."""
    state, metrics = one_step(prepare(mixed))
    assert all(np.any(leaf) for leaf in jax.tree.leaves(state.optimizer[0].mu))
    assert metrics.positions > 100
    return state, metrics


def slow(cases: dict[str, Any]) -> list[Any]:
    return [pytest.param(case, id=name, marks=pytest.mark.slow) for name, case in cases.items()]


@pytest.mark.parametrize("mesh", [*(pytest.param(mesh, id=name) for name, mesh in MESHES.items()), *slow(MORE_MESHES)])
def test_a_step_on_a_mesh_is_that_of_one_device(mixed, alone, mesh):
    sizes = dict(zip(sharding.MESH_AXES, mesh, strict=True))
    config = dataclasses.replace(mixed, mesh=dataclasses.replace(mixed.mesh, **sizes))
    layout = make_layout(config)
    assert dict(layout.mesh.shape) == sizes
    run = prepare(config, layout)
    assert (not run.initial.trained.block["wq"].sharding.is_fully_replicated) == (sizes["fsdp"] * sizes["tensor"] > 1)
    assert_same_step(one_step(run), alone)


def test_data_alone_lies_across_slices(mixed, alone, monkeypatch):
    """Two virtual slices, whose devices take turns in the list of all."""
    monkeypatch.setattr("eesd_jax.distill.layout._slice_of", lambda device: device.id % 2)
    config = dataclasses.replace(mixed, mesh=MeshConfig(data=2, fsdp=4))
    layout = make_layout(config)
    assert [{device.id % 2 for device in part.flat} for part in layout.mesh.devices] == [{0}, {1}]
    assert_same_step(one_step(prepare(config, layout)), alone)
    with pytest.raises(UserError, match=r"data 1 x fsdp 8 .* over 2 slices; expected a multiple of 2 for data"):
        make_layout(dataclasses.replace(mixed, mesh=MeshConfig(data=1, fsdp=8)))


@pytest.mark.parametrize("parts", [2, *slow({"4": 4})])
def test_accumulated_parts_are_the_whole_batch(mixed, alone, parts):
    config = dataclasses.replace(mixed, optimizer=dataclasses.replace(mixed.optimizer, accumulate=parts))
    assert_same_step(one_step(prepare(config)), alone)


# Packed rows ------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def packed(dataset, tmp_path_factory) -> tuple[trainer.Run, data.Batch, jax.Array, jax.Array]:
    """A run, a batch of packed rows, h_N on it, and the branch's normed output."""
    run = prepare(make_config(dataset, tmp_path_factory.mktemp("packed")))
    batch = first_batch(run)
    return run, batch, *seen(run, batch)


def seen(run: trainer.Run, batch: data.Batch) -> tuple[jax.Array, jax.Array]:
    return jax.jit(_seen, static_argnums=0)(run.model_config, run.initial.trained, run.frozen, batch)


def _seen(config, trained, frozen, batch):
    hidden, _ = teacher.hidden_states(config, frozen.trunk, batch, last=False)
    return hidden, step.branch_hidden(config, step.to_branch(trained, frozen, jnp.float32), hidden, batch)


def pieces(batch: data.Batch) -> list[tuple[int, np.ndarray]]:
    """Row and places of every example in a batch."""
    found = [(row, np.flatnonzero(ids == s)) for row, ids in enumerate(batch.segments) for s in range(1, ids.max() + 1)]
    assert len(found) > len(batch.row)
    return found


def test_what_a_step_sees_of_a_packed_example_is_what_decoding_sees(packed):
    """Hidden states of block N by the decoder's own blocks, and the branch by its exit block, a token at a time with a cache."""
    run, batch, hidden, outputs = packed
    config, exit_layer = run.model_config, run.config.branch.exit_layer
    params = teacher.join_trunk(config, run.frozen.trunk)
    branch = step.to_branch(run.initial.trained, run.frozen, jnp.float32)
    width = batch.tokens.shape[1]

    @jax.jit
    def alone(tokens_1xT):
        x = llama.embed(params, tokens_1xT)
        return llama.forward_blocks(config, params["blocks"], x, jnp.zeros(1, jnp.int32), None, range(exit_layer))[0]

    @jax.jit
    def one_token(hidden_1x1xD, cache, start_1):
        x, entries = exit_branch.run_exit_block(config, branch, hidden_1x1xD, start_1, cache)
        return llama.rms_norm(x, branch.norm, config.norm_eps), kv.write(cache, entries, start_1, x)

    for row, places in pieces(batch)[:6]:
        tokens = np.zeros((1, width), np.int32)
        tokens[0, : len(places)] = batch.tokens[row, places]
        decoded = alone(tokens)[0, : len(places)]
        np.testing.assert_allclose(hidden[row, places], decoded, rtol=1e-4, atol=1e-5)
        cache = kv.empty(config, 1, width, jnp.float32, blocks=1)
        for t, place in enumerate(places):
            output, cache = one_token(decoded[None, t : t + 1], cache, jnp.array([t]))
            np.testing.assert_allclose(outputs[row, place], output[0, 0], rtol=1e-4, atol=1e-5)


def test_packed_examples_do_not_see_each_other(packed):
    run, batch, hidden, outputs = packed
    (row, places), *_ = pieces(batch)
    others = batch.segments != batch.segments[row, places[0]]
    others[np.arange(len(others)) != row] = True
    changed = batch._replace(tokens=np.where(others, (batch.tokens + 7) % 100, batch.tokens))
    assert np.any(changed.tokens[row] != batch.tokens[row])
    for again, before in zip(seen(run, changed), (hidden, outputs), strict=True):
        np.testing.assert_array_equal(again[row, places], before[row, places])


# Cached mode ------------------------------------------------------------------------------------------------------------------------------


def cached(config: ExperimentConfig, output: pathlib.Path, **changes: Any) -> ExperimentConfig:
    return dataclasses.replace(config, output_dir=str(output), cache=dataclasses.replace(config.cache, enabled=True, **changes))


def branch_of(config: ExperimentConfig, model: Any) -> exit_branch.ExitBranch:
    return branch_folder.load_branch(f"{config.output_dir}/exit_branch", model.config, model.params).branch


OTHER_LOSSES = {"soft": 0.0, "reverse_kl": 0.5, "total_variation": 0.5, "regression": 0.5}


@pytest.mark.parametrize("changes", [pytest.param({}, id="soft"), *slow({"others": OTHER_LOSSES})])
def test_from_a_cache_of_all_tokens_training_is_that_online(config, on_one_device, tmp_path, changes):
    config = dataclasses.replace(config, loss=dataclasses.replace(config.loss, **changes))
    other = cached(config, tmp_path / "cached", top_tokens=104, dtype="float32")
    trainer.train(config)
    trainer.train(other)
    model = load_model(config.model, jnp.dtype("float32"))
    start = exit_branch.init_exit_branch(model.config, model.params, config.branch.exit_layer, config.branch.start)
    online, offline = branch_of(config, model), branch_of(other, model)
    for one, two, first in zip(jax.tree.leaves(online.block), jax.tree.leaves(offline.block), jax.tree.leaves(start.block), strict=True):
        assert np.linalg.norm(one - two) <= 1e-3 * np.linalg.norm(one - first)
    for one, two in zip(read_metrics(config), read_metrics(other), strict=True):
        assert one.keys() == two.keys()
        assert all(two[name] == pytest.approx(value, rel=1e-4, abs=1e-5) for name, value in one.items()), (one, two)


def fill(config: ExperimentConfig) -> dict[str, teacher.FeatureCache]:
    run = prepare(config)
    return run.fill_caches(Monitor(run.output, 1, writes=False))


def test_a_cache_of_other_features_is_refused(config, tmp_path):
    folder = str(tmp_path / "features")
    caches = fill(cached(config, tmp_path / "one", path=folder))
    assert [cache.complete for cache in caches.values()] == [True, True]
    for changes, named in (({"top_tokens": 8}, "kinds"), ({"dtype": "float32"}, "dtype, kinds")):
        with pytest.raises(UserError, match=f"caches other features: it differs in {named}; expected another cache.path"):
            fill(cached(config, tmp_path / "two", path=folder, **changes))
    (pathlib.Path(folder) / "train" / "ids.npy").unlink()
    with pytest.raises(UserError, match=r"cannot be read .*expected a whole cache"):
        fill(cached(config, tmp_path / "two", path=folder))


def test_a_loss_that_the_cache_cannot_express_is_refused(config, tmp_path):
    for name in ("reverse_kl", "total_variation"):
        other = dataclasses.replace(config, loss=dataclasses.replace(config.loss, **{name: 0.5}))
        with pytest.raises(UserError, match=rf"loss.{name} needs the whole distribution .* keeps 16 tokens of 104; expected"):
            prepare(cached(other, tmp_path / "cached"))
    with pytest.raises(UserError, match=r"cache\.top_tokens is 105; expected 1 to 104"):
        prepare(cached(config, tmp_path / "cached", top_tokens=105))


def test_values_that_the_cache_cannot_hold_are_refused(config, tmp_path, monkeypatch):
    real = trainer.Run._features_to_keep

    def large(run, trunk, batch):
        features = real(run, trunk, batch)
        return features._replace(hidden=features.hidden * 1e5)

    monkeypatch.setattr(trainer.Run, "_features_to_keep", large)
    with pytest.raises(UserError, match=r"the target's hidden of rows 0 to 3 has values beyond float16; expected cache.dtype='float32'"):
        fill(cached(config, tmp_path / "cached"))


# The loop ---------------------------------------------------------------------------------------------------------------------------------


def stop_at(monkeypatch: pytest.MonkeyPatch, at: int, how: Callable[[], None]) -> None:
    """Once, when the metrics of that step are shown."""
    show = Monitor.step

    def step(monitor: Monitor, number: int, *details: Any) -> None:
        show(monitor, number, *details)
        if number == at:
            monkeypatch.setattr(Monitor, "step", show)
            how()

    monkeypatch.setattr(Monitor, "step", step)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def crash() -> None:
    raise RuntimeError("crash")


def test_a_run_that_was_stopped_ends_as_one_that_was_not(config, on_one_device, tmp_path, monkeypatch):
    """By SIGTERM between checkpoints and at an evaluation, and by an error: parameters, lines and what is said of the branch."""
    whole = dataclasses.replace(config, output_dir=str(tmp_path / "whole"))
    result = trainer.train(whole)
    assert (result.step, result.stopped) == (config.steps, False)
    handler = signal.getsignal(signal.SIGTERM)
    for at in (1, 3):  # a step's metrics are shown behind the next one: it stops behind 2, and behind 4, where an evaluation is due
        stop_at(monkeypatch, at, terminate)
        assert trainer.train(config) == (at + 1, True, {})
    assert signal.getsignal(signal.SIGTERM) is handler
    for at in (5, config.steps):  # the last one behind the last step, but before its checkpoint
        stop_at(monkeypatch, at, crash)
        with pytest.raises(RuntimeError, match="crash"):
            trainer.train(config)
    with monkeypatch.context() as patch:  # behind the last checkpoint and the last evaluation
        patch.setattr(Monitor, "plot", lambda monitor: crash())
        with pytest.raises(RuntimeError, match="crash"):
            trainer.train(config)
    assert trainer.train(config) == result
    assert exported(config) == exported(whole)
    infos = [(pathlib.Path(c.output_dir) / "exit_branch" / branch_folder.INFO_NAME).read_text() for c in (config, whole)]
    assert infos[0] == infos[1]
    lines = read_metrics(whole)
    assert read_metrics(config) == lines
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, config.steps + 1))
    assert [line["step"] for line in lines if "held_out/loss" in line] == [4, 8, config.steps]


def test_a_finished_run_changes_nothing(config, on_one_device):
    result = trainer.train(config)
    before = files(config)
    assert trainer.train(config) == result
    assert files(config) == before
    other = dataclasses.replace(config, seed=5, mesh=dataclasses.replace(config.mesh, data=8))
    with pytest.raises(UserError, match=r"holds another experiment: seed was 0 and is now 5; expected the same config"):
        trainer.train(other)
    trainer.train(dataclasses.replace(config, mesh=other.mesh))
    assert files(config) == before


def test_another_experiment_does_not_go_on_from_a_checkpoint(config, on_one_device, monkeypatch, tmp_path):
    stop_at(monkeypatch, 5, crash)
    with pytest.raises(RuntimeError, match="crash"):
        trainer.train(config)
    before = files(config)
    new_data = dataclasses.replace(config.data, path=write_dataset(tmp_path / "new", seed=5))
    others = {
        "optimizer.learning_rate was 0.003 and is now 0.5": {"optimizer": dataclasses.replace(config.optimizer, learning_rate=0.5)},
        "steps was 10 and is now 99": {"steps": 99},
        "data.fingerprint was '.*' and is now '.*'": {"data": new_data},
        "model.dtype was 'float32' and is now 'bfloat16'": {"dtype": "bfloat16"},
    }
    for message, changes in others.items():
        with pytest.raises(UserError, match=f"run holds another experiment: .*{message}.*; expected the same config, or"):
            trainer.train(dataclasses.replace(config, **changes))
    after = files(config)
    metrics = str(pathlib.Path(config.output_dir) / METRICS_NAME)
    assert after.keys() == before.keys()
    assert all(after[path] == content for path, content in before.items() if path != metrics)
    # What a run may go on with: more evaluations, more checkpoints, the same data elsewhere.
    free = {"checkpoint": dataclasses.replace(config.checkpoint, every=3), "evaluation": dataclasses.replace(config.evaluation, every=0)}
    moved = dataclasses.replace(config.data, path=write_dataset(tmp_path / "same"))
    assert trainer.train(dataclasses.replace(config, data=moved, **free)).step == config.steps


def test_a_loss_that_is_no_number_stops_the_run_and_spares_the_last_good_checkpoint(config, on_one_device):
    optimizer = dataclasses.replace(config.optimizer, learning_rate=1e30, warmup_steps=100)  # the first step's rate is 0
    config = dataclasses.replace(config, optimizer=optimizer, checkpoint=dataclasses.replace(config.checkpoint, every=1))
    with pytest.raises(UserError, match=r"step 2: .*param_norm is inf; the last good checkpoint is of step 1; expected finite"):
        trainer.train(config)
    run = prepare(config)
    start = jax.device_get(run.initial.trained)
    with Checkpoints(run.output / "checkpoints", 2, run.identity) as checkpoints:
        state, beside = checkpoints.restore(run.initial)
    assert int(state.step) == 1
    jax.tree.map(np.testing.assert_array_equal, state.trained, start)
    assert not (run.output / "exit_branch").exists()
    loader = data.make_loader(run.rows, config.batch_size, config.seed, 0, 1)
    next(loader)
    wanted = next(loader)
    loader.set_state(beside["iterator"])
    jax.tree.map(np.testing.assert_array_equal, next(loader), wanted)


def test_what_a_kill_leaves_of_a_checkpoint_being_removed_is_removed(tmp_path):
    def state(step: int) -> dict[str, jax.Array]:
        return {"weight": jnp.full((4,), step, jnp.float32), "step": jnp.int32(step)}

    with Checkpoints(epath.Path(tmp_path / "whole"), 3, {}) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, state(step), {"said": step})
    paths = sorted(path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole" / "1").rglob("*") if path.is_file())
    for order in (paths, paths[::-1]):
        for count in range(1, len(paths) + 1):
            torn = tmp_path / "torn"
            shutil.copytree(tmp_path / "whole", torn)
            for path in order[:count]:
                (torn / path).unlink()
            with Checkpoints(epath.Path(torn), 2, {}) as checkpoints:
                restored, beside = checkpoints.restore(state(0))
                checkpoints.save(4, state(4), {"said": 4})
            jax.tree.map(np.testing.assert_array_equal, restored, state(3))
            assert beside == {"said": 3}
            assert sorted(path.name for path in torn.iterdir()) == ["3", "4"]
            shutil.rmtree(torn)


@pytest.mark.slow
def test_a_run_goes_on_on_other_devices(config, tmp_path, monkeypatch):
    """The same data and, within rounding, the same parameters."""
    whole = dataclasses.replace(config, output_dir=str(tmp_path / "whole"))
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "make_layout", one_device)
        trainer.train(whole)
        stop_at(patch, 5, crash)
        with pytest.raises(RuntimeError, match="crash"):
            trainer.train(config)
    trainer.train(dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, data=2, fsdp=2, tensor=2)))
    model = load_model(config.model, jnp.dtype("float32"))
    one, two = branch_of(whole, model), branch_of(config, model)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), one, two)
    for line, other in zip(read_metrics(whole), read_metrics(config), strict=True):
        if "positions" in line:
            assert line["positions"] == other["positions"]
            assert line["loss"] == pytest.approx(other["loss"], rel=1e-5)


# What comes out ---------------------------------------------------------------------------------------------------------------------------


class Finished(NamedTuple):
    """A run that was watched. alive: bytes of all arrays behind each evaluation. programs: how often each was compiled."""

    run: trainer.Run
    result: trainer.Result
    model: LoadedModel
    alive: list[int]
    programs: dict[str, int]


@pytest.fixture(scope="module")
def finished(dataset, tmp_path_factory) -> Finished:
    """Five evaluations, with rollouts; 40 tokens to draft, a result in bfloat16, and no checkpoint before the last, as it is a copy."""
    config = make_config(dataset, tmp_path_factory.mktemp("finished"))
    config = dataclasses.replace(
        config,
        branch=dataclasses.replace(config.branch, draft_vocab=40, save_dtype="bfloat16"),
        evaluation=dataclasses.replace(config.evaluation, every=2, rollouts=2),
        checkpoint=dataclasses.replace(config.checkpoint, every=100),
    )
    measure, alive = evaluation.Evaluation.measure, []

    def watched(self, trained):
        values = measure(self, trained)
        alive.append(sum(array.nbytes for array in jax.live_arrays()))
        return values

    run = prepare(config)
    gc.collect()
    gc.disable()  # what is not needed is to go at once, without a search for it
    try:
        with pytest.MonkeyPatch.context() as patch, compiled.programs() as counts:
            patch.setattr(evaluation.Evaluation, "measure", watched)
            result = run.train()
    finally:
        gc.enable()
    return Finished(run, result, load_model(config.model, jnp.dtype("float32"), run.layout.mesh), alive, dict(counts))


def test_only_the_branch_learns(finished):
    """To the bit: behind all steps, evaluations and the export, the target is what was loaded."""
    run, model = finished.run, finished.model
    jax.tree.map(np.testing.assert_array_equal, teacher.join_trunk(model.config, run.frozen.trunk), model.params)
    started = exit_branch.init_exit_branch(model.config, model.params, 2, run.config.branch.start, np.asarray(run.frozen.draft_ids))
    np.testing.assert_array_equal(run.frozen.head, started.head)
    learnt = branch_of(run.config, model)
    changed = jax.tree.map(lambda a, b: not np.array_equal(a, b.astype(jnp.bfloat16).astype(b.dtype)), learnt, started)
    assert all(changed.block.values())
    assert (changed.norm, changed.head, changed.draft_ids) == (True, False, False)


def test_evaluations_compile_once_and_leave_no_copy_of_the_target(finished):
    programs = ("train_step", "evaluate", "prefill", "_decode_speculative")
    assert {name: finished.programs[name] for name in programs} == dict.fromkeys(programs, 1)
    assert len(finished.alive) == finished.run.config.steps // 2
    trunk = sum(leaf.nbytes for leaf in jax.tree.leaves(finished.model.params))
    assert max(finished.alive) - min(finished.alive) < trunk / 2


def test_rollouts_are_of_the_real_decoder(finished):
    metrics = finished.result.metrics
    assert 1 <= metrics["tokens_per_round"] <= finished.run.config.evaluation.rollout_draft + 1
    assert [name for name in metrics if name.startswith("acceptance")] == ["acceptance_1", "acceptance_2"]
    assert all(0 <= metrics[name] <= 1 for name in ("agreement", "overlap", "coverage", "acceptance_1", "acceptance_2"))


def test_the_exported_branch_loads_and_greedy_text_is_that_of_plain_decoding(finished):
    config, model = finished.run.config, finished.model
    mesh = finished.run.layout.mesh
    loaded, info = branch_folder.load_branch(f"{config.output_dir}/exit_branch", model.config, model.params, mesh)
    assert loaded.draft_ids.size == 40
    assert info.training["held_out"] == finished.result.metrics
    assert info.training["config"] == json.loads(json.dumps(comparable(config)))
    assert np.isfinite([info.calibration_slope, info.calibration_intercept]).all()
    assert (info.calibration_slope, info.calibration_intercept) != (1.0, 0.0)
    draft = DraftConfig(config.branch.exit_layer, max_draft=2, verify_widths=())
    engine = Engine(model, DecodeConfig(), Drafter(loaded, draft, Calibration(), trained=True))
    options = {"prompts": [[5, 9, 30], [60, 61, 62, 63]], "seeds": [0, 0], "max_new_tokens": 40}
    plain, drafted = (engine.generate_ids(**options, controller=controller) for controller in (None, Fixed(2)))
    assert [one.token_ids for one in drafted] == [one.token_ids for one in plain]
    assert sum(one.log.accepted.sum() for one in drafted) > 0


def read_events(records: bytes) -> Iterator[event_pb2.Event]:
    """TFRecords: a length, its checksum, an event, its checksum."""
    while records:
        (length,) = struct.unpack("<Q", records[:8])
        event = event_pb2.Event()
        event.ParseFromString(records[12 : 12 + length])
        yield event
        records = records[16 + length :]


def test_what_a_run_shows_can_be_read(finished):
    """A line a step and an evaluation, the same as TensorBoard events, and a picture."""
    output, config = finished.run.output, finished.run.config
    lines = read_metrics(config)
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, config.steps + 1))
    (last,) = [line for line in lines if line["step"] == config.steps and "loss" not in line]
    wanted = {f"held_out/{name}": value for name, value in finished.result.metrics.items()}
    assert last == pytest.approx({"step": config.steps} | wanted, rel=1e-5)
    found = {}
    for file in (output / "tensorboard").iterdir():
        for event in read_events(file.read_bytes()):
            found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
    for line in lines:
        if line["step"] % 10 == 0 or "loss" not in line:
            for name, value in line.items():
                if name != "step":
                    assert found[name, line["step"]] == pytest.approx(value, rel=1e-4), name
    assert (output / "training.png").read_bytes().startswith(b"\x89PNG")


def test_held_out_means_are_over_every_row_once(config, on_one_device, tmp_path):
    """Whatever the batches: the last one is filled up, and that does not count."""
    found = []
    for batch_size in (4, 7):
        run = prepare(dataclasses.replace(config, batch_size=batch_size))
        one = evaluation.Evaluation(run.config, run.step_config, run.frozen, run.layout, run.held_out, None, run.tokenizer, run.eos_ids)
        found.append(one.measure(run.initial.trained))
        assert sum(np.sum(batch.loss_mask) for batch, _ in one._batches(100)) == run.held_out.num_response_tokens
    assert len(run.held_out) % 4
    assert len(run.held_out.examples) == NUM_VALIDATION
    assert found[1] == pytest.approx(found[0], rel=1e-5)


@pytest.mark.parametrize(("slope", "intercept"), [(1.0, 0.0), (0.6, -0.8), (1.7, 0.5)])
def test_the_calibration_finds_slope_and_intercept(slope, intercept):
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.02, 0.98, 200_000).astype(np.float32)
    accepted = rng.random(confidence.shape) < np.asarray(Calibration(slope, intercept)(jnp.asarray(confidence)))
    found = evaluation.fit_calibration(confidence, accepted)
    assert found.slope == pytest.approx(slope, abs=0.03)
    assert found.intercept == pytest.approx(intercept, abs=0.03)


def test_the_calibration_is_finite_where_the_data_says_little():
    confidence = np.array([0.0, 0.2, 0.9, 1.0], np.float32)
    for accepted in ([True] * 4, [False] * 4):
        assert evaluation.fit_calibration(confidence, np.array(accepted)) == Calibration()
    assert evaluation.fit_calibration(confidence[:0], np.zeros(0, bool)) == Calibration()
    separable = evaluation.fit_calibration(confidence, np.array([False, False, True, True]))
    assert np.isfinite([separable.slope, separable.intercept]).all()
    assert separable.slope > 1


def test_every_field_that_makes_an_experiment_is_compared(config):
    everything = set(comparable(config))
    flat = {
        f"{name}.{inner}" if isinstance(value, dict) else name
        for name, value in experiment.to_dict(config).items()
        for inner in (value if isinstance(value, dict) else [""])
    }
    free = {name for name in flat if name.split(".")[0] in ("output_dir", "mesh", "checkpoint", "evaluation", "self_generate")}
    assert everything == flat - free - {"data.path", "cache.path"}
