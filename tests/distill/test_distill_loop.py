"""Whole runs of training: the same from a cache of features as without, and however often they are stopped.

Runs are in this process, most on one of its eight devices; kills and several processes are in `test_distill_processes.py`.
"""

import dataclasses
import os
import pathlib
import shutil
import signal
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from experiments import branch_of, make_config, one_device, prepare, read_metrics, write_dataset

from eesd_jax.config import ExperimentConfig
from eesd_jax.distill import data, experiment, teacher, trainer
from eesd_jax.distill.checks import comparable
from eesd_jax.distill.monitor import METRICS_NAME, Monitor
from eesd_jax.errors import UserError
from eesd_jax.model import exit_branch
from eesd_jax.weights import branch_folder
from eesd_jax.weights.checkpoint import Checkpoints
from eesd_jax.weights.load import load_model


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


# Cached mode ------------------------------------------------------------------------------------------------------------------------------


def cached(config: ExperimentConfig, output: pathlib.Path, **changes: Any) -> ExperimentConfig:
    return dataclasses.replace(config, output_dir=str(output), cache=dataclasses.replace(config.cache, enabled=True, **changes))


OTHER_LOSSES = {"soft": 0.0, "reverse_kl": 0.5, "total_variation": 0.5, "regression": 0.5}


@pytest.mark.parametrize("changes", [pytest.param({}, id="soft"), pytest.param(OTHER_LOSSES, id="others", marks=pytest.mark.slow)])
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


def test_several_datasets_are_read_as_one_and_each_is_cached_once(config, dataset, tmp_path):
    other = write_dataset(tmp_path / "other", seed=1, num_train=9)
    folder, both = str(tmp_path / "features"), f"{dataset},{other}"
    settings = dataclasses.replace(config, data=dataclasses.replace(config.data, path=both))
    run = prepare(cached(settings, tmp_path / "both", path=folder, dtype="float32"))
    caches = run.fill_caches(Monitor(run.output, 1, writes=False))
    alone = [
        prepare(cached(with_data(config, path), tmp_path / "alone", path=str(tmp_path / f"f{i}"), dtype="float32"))
        for i, path in enumerate((dataset, other))
    ]
    rows = [row for one in alone for row in one.rows]
    assert len(run.rows) == len(rows)
    assert run.rows.num_response_tokens == sum(one.rows.num_response_tokens for one in alone)
    jax.tree.map(np.testing.assert_array_equal, [row._replace(row=0) for row in run.rows], [row._replace(row=0) for row in rows])
    assert [int(row.row) for row in run.rows] == list(range(len(rows)))
    one_by_one = [one.fill_caches(Monitor(one.output, 1, writes=False))["train"] for one in alone]
    right = [cache.read(np.arange(len(one.rows)), 64) for one, cache in zip(alone, one_by_one, strict=True)]
    order = np.random.default_rng(0).permutation(len(rows))
    found = caches["train"].read(order, 64)
    jax.tree.map(lambda a, *parts: np.testing.assert_allclose(a, np.concatenate(parts)[order], atol=1e-6), found, *right)
    written = {path: path.stat().st_mtime_ns for path in pathlib.Path(folder).rglob("*.npy")}
    turned = dataclasses.replace(config, data=dataclasses.replace(config.data, path=f"{other},{dataset}"))
    assert (
        prepare(cached(turned, tmp_path / "turned", path=folder, dtype="float32"))
        .fill_caches(Monitor(run.output, 1, writes=False))["train"]
        .complete
    )
    assert written == {path: path.stat().st_mtime_ns for path in pathlib.Path(folder).rglob("*.npy")}


def with_data(config: ExperimentConfig, path: str) -> ExperimentConfig:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, path=path))


def test_training_goes_on_from_an_exported_branch(config, on_one_device, tmp_path):
    trainer.train(config)
    exported = f"{config.output_dir}/exit_branch"
    onward = dataclasses.replace(config, output_dir=str(tmp_path / "onward"), branch=dataclasses.replace(config.branch, init_from=exported))
    model = load_model(config.model, jnp.dtype("float32"))
    run = prepare(onward)
    jax.tree.map(np.testing.assert_array_equal, run.initial.trained.block, branch_of(config, model).block)
    trainer.train(onward)
    first, last = ([line["loss"] for line in read_metrics(one) if "positions" in line] for one in (config, onward))
    assert last[0] < first[0] and np.mean(last) < np.mean(first)
    for changes, line in (({"deep_input": True}, "deep_input False"), ({"draft_vocab": 40}, "draft_vocab of 104")):
        other = dataclasses.replace(onward, branch=dataclasses.replace(onward.branch, **changes))
        with pytest.raises(UserError, match=f"branch.init_from is '.*exit_branch', which has .*{line}.*; expected the same"):
            prepare(other)
    with pytest.raises(UserError, match="no-such-branch"):
        trainer.train(
            dataclasses.replace(
                onward, output_dir=str(tmp_path / "x"), branch=dataclasses.replace(onward.branch, init_from="./no-such-branch")
            )
        )


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


def exported(config: ExperimentConfig) -> bytes:
    return (pathlib.Path(config.output_dir) / "exit_branch" / branch_folder.TENSORS_NAME).read_bytes()


def files(config: ExperimentConfig) -> dict[str, tuple[int, bytes]]:
    paths = [path for path in pathlib.Path(config.output_dir).rglob("*") if path.is_file()]
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}


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


def test_every_field_that_makes_an_experiment_is_compared(config):
    everything = set(comparable(dataclasses.replace(config, quantize="int8", branch=dataclasses.replace(config.branch, init_from="x"))))
    flat = {
        f"{name}.{inner}" if isinstance(value, dict) else name
        for name, value in experiment.to_dict(config).items()
        for inner in (value if isinstance(value, dict) else [""])
    }
    free = {name for name in flat if name.split(".")[0] in ("output_dir", "mesh", "checkpoint", "evaluation", "self_generate")}
    assert everything == flat - free - {"data.path", "cache.path"}
    assert set(comparable(config)) == everything - {"quantize", "branch.init_from"}  # of runs from before there were those fields
