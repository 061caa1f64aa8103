"""`train/distill.py` as real processes: killed at any moment, asked to end, and several at once. Minutes: all are marked `slow`."""

import json
import math
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
import surroundings
from experiments import write_dataset
from orbax.checkpoint import v1 as ocp
from safetensors.numpy import load

from eesd_jax.weights.branch_folder import INFO_NAME, TENSORS_NAME

pytestmark = pytest.mark.slow

SCRIPT = pathlib.Path(__file__).parent.parent.parent / "train" / "distill.py"
CONFIG = pathlib.Path(__file__).parent.parent.parent / "configs" / "tiny.py"
KILLS = 12
STEPS = 150
PATIENCE = 300  # seconds, for a machine that does other things as well


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> str:
    return write_dataset(tmp_path_factory.mktemp("data") / "dataset")


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    """One device a process."""
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": surroundings.xla_flags(1)}


@pytest.fixture
def start(dataset, environment):
    """Starts the command with those fields; whatever still runs in the end is killed."""
    running = []

    def start(output: pathlib.Path, *arguments: str, cwd: pathlib.Path | None = None, **fields: Any) -> subprocess.Popen:
        fields = {"output_dir": output, "data.path": dataset, "evaluation.rollouts": 0} | {
            name.replace("__", "."): value for name, value in fields.items()
        }
        line = [sys.executable, SCRIPT, f"--config={CONFIG}", *(f"--config.{name}={value}" for name, value in fields.items()), *arguments]
        process = subprocess.Popen(line, env=environment, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        running.append(process)
        return process

    yield start
    for process in running:
        process.kill()
        process.wait()


def finish(*processes: subprocess.Popen, code: int = 0) -> list[str]:
    """Waits for all, which must end with that code, and gives what each wrote to stderr."""
    ends = [process.communicate(timeout=PATIENCE) for process in processes]
    assert [process.returncode for process in processes] == [code] * len(processes), ends
    return [err for _, err in ends]


def wait_until(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    """Until it is true, or the process has ended."""
    deadline = time.monotonic() + PATIENCE
    while not condition() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def result_of(output: pathlib.Path) -> tuple[bytes, str, list[dict[str, Any]]]:
    """The branch, what is said of it, and the lines of the run without what depends on the clock."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    lines = [{name: value for name, value in line.items() if name != "tokens_per_second"} for line in lines]
    return (output / "exit_branch" / TENSORS_NAME).read_bytes(), (output / "exit_branch" / INFO_NAME).read_text(), lines


def checkpoint_steps(output: pathlib.Path) -> list[int]:
    folder = output / "checkpoints"
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.exists() else []


def being_written(output: pathlib.Path) -> list[str]:
    folder = output / "checkpoints"
    return [path.name for path in folder.iterdir() if not path.name.isdigit()] if folder.exists() else []


def read_checkpoints(output: pathlib.Path, copy: pathlib.Path, keep: int) -> dict[int, list[np.ndarray]]:
    """The checkpoints that a run keeps, from a copy: reading is not to change what is read. An older one may be half removed."""
    shutil.copytree(output / "checkpoints", copy)
    with ocp.training.Checkpointer(copy) as checkpointer:
        found = {item.step: jax.tree.leaves(jax.device_get(checkpointer.load(item.step))) for item in checkpointer.checkpoints[-keep:]}
    shutil.rmtree(copy)
    return found


def test_kills_at_any_moment_change_nothing(start, tmp_path):
    """Twelve, some while a checkpoint is being written; every checkpoint they leave is that of a run that nobody killed."""
    often = {"steps": STEPS, "checkpoint__every": 1, "evaluation__every": 10, "checkpoint__keep": 2}
    whole, output = tmp_path / "whole", tmp_path / "killed"
    finish(start(whole, **often | {"checkpoint__keep": 1000}))
    states = read_checkpoints(whole, tmp_path / "copy", keep=1000)
    assert sorted(states) == list(range(1, STEPS + 1))
    rng = random.Random(0)
    kills = torn = 0
    reached = []
    while kills < KILLS:
        process = start(output, **often)
        before = checkpoint_steps(output)
        if kills % 3 == 0:  # at any moment of its life
            time.sleep(rng.uniform(0.1, 6))
        else:  # once it trains
            wait_until(lambda before=before: checkpoint_steps(output) != before, process)
            time.sleep(rng.uniform(0, 0.5))
            if kills % 3 == 1:
                wait_until(lambda: bool(being_written(output)), process)
        process.kill()
        assert process.wait() == -signal.SIGKILL, process.communicate()
        kills += 1
        torn += bool(being_written(output))
        if checkpoint_steps(output):
            left = read_checkpoints(output, tmp_path / "copy", keep=2)
            reached.append(max(left))
            for step, leaves in left.items():
                for leaf, right in zip(leaves, states[step], strict=True):
                    np.testing.assert_array_equal(leaf, right)
    print(f"{kills} kills behind steps {reached}, {torn} of them while a checkpoint was being written")
    assert torn >= 2
    assert reached == sorted(reached)
    assert 0 < reached[-1] < STEPS
    (err,) = finish(start(output, **often))
    assert f"resumed behind step {reached[-1]}\n" in err
    assert result_of(output) == result_of(whole)
    assert not being_written(output)


def test_kills_while_the_cache_is_filled_change_nothing(start, tmp_path):
    small = {"steps": 6, "batch_size": 1, "data__sequence_length": 40, "data__pack": False, "cache__enabled": True, "loss__chunk": 8}
    data = {"data__path": write_dataset(tmp_path / "data", num_train=600)}
    whole, output = tmp_path / "whole", tmp_path / "killed"
    finish(start(whole, **small, **data))
    progress = output / "cache" / "train" / "rows_done"
    done = []
    for wanted in (None, 1, 128, 300):
        process = start(output, **small, **data)
        if wanted is None:  # while its files are made
            wait_until((output / "cache" / "train" / "hidden.npy").exists, process)
        else:
            wait_until(lambda wanted=wanted: progress.exists() and int(progress.read_text()) >= wanted, process)
        process.kill()
        assert process.wait() == -signal.SIGKILL, process.communicate()
        done.append(int(progress.read_text()) if progress.exists() else 0)
    assert done == sorted(done)
    assert done[0] < 600
    finish(start(output, **small, **data))
    assert result_of(output) == result_of(whole)
    for name in ("hidden", "ids", "log_probs"):
        ours, right = (np.load(folder / "cache" / "train" / f"{name}.npy") for folder in (output, whole))
        np.testing.assert_array_equal(ours, right)


def test_sigterm_saves_and_ends_with_143(start, tmp_path):
    fields = {"steps": 300, "checkpoint__every": 1000, "evaluation__every": 0}
    whole, output = tmp_path / "whole", tmp_path / "stopped"
    finish(start(whole, **fields))
    process = start(output, **fields)
    wait_until(lambda: (output / "metrics.jsonl").exists() and "\n" in (output / "metrics.jsonl").read_text(), process)
    process.terminate()
    (err,) = finish(process, code=143)
    (step,) = checkpoint_steps(output)
    assert f"stopped behind step {step} of 300; the same command goes on from there\n" in err
    assert "Traceback" not in err
    (err,) = finish(start(output, **fields))
    assert f"resumed behind step {step}\n" in err
    assert result_of(output) == result_of(whole)


# Several processes ------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def start_together(start):
    """Starts that many processes of one run, which find each other on this machine; single ones with arguments or folders of their own."""

    def start_together(
        output: pathlib.Path,
        count: int,
        own: dict[int, list[str]] | None = None,
        folders: dict[int, pathlib.Path] | None = None,
        **fields: Any,
    ) -> list[subprocess.Popen]:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        who = [f"--coordinator_address={address}", f"--num_processes={count}"]
        return [
            start(output, *who, f"--process_id={i}", *(own or {}).get(i, ()), cwd=(folders or {}).get(i), **fields) for i in range(count)
        ]

    return start_together


SHORT = {"steps": 8, "optimizer__learning_rate": 1e-3, "optimizer__warmup_steps": 2, "evaluation__every": 4, "checkpoint__every": 3}


MESHES = {
    "2: data 2": {"data": 2},
    "4: data 4": {"data": 4},
    "4: data 2, fsdp 2": {"data": 2, "fsdp": 2},
    "2: tensor 2": {"tensor": 2},
    "4: fsdp 2, tensor 2": {"fsdp": 2, "tensor": 2},
}


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
def test_several_processes_are_one(start, start_together, tmp_path, mesh):
    """The same data, and loss, held-out loss and parameters within 1e-5."""
    one, several, count = tmp_path / "one", tmp_path / "several", math.prod(mesh.values())
    fields = SHORT | {"mesh__data": 1} | {f"mesh__{axis}": size for axis, size in mesh.items()}
    finish(start(one, **SHORT))
    errors = finish(*start_together(several, count, **fields))
    assert not any("Traceback" in err for err in errors)
    (branch, info, lines), (right, right_info, right_lines) = result_of(several), result_of(one)
    for line, wanted in zip(lines, right_lines, strict=True):
        assert line.keys() == wanted.keys()
        assert (line["step"], line.get("positions")) == (wanted["step"], wanted.get("positions"))
        for name in line.keys() & {"loss", "overlap", "grad_norm", "param_norm", "held_out/loss", "held_out/overlap"}:
            assert line[name] == pytest.approx(wanted[name], rel=1e-5), name
    for name, leaf in load(branch).items():
        wanted = load(right)[name]
        assert np.linalg.norm(leaf - np.float64(wanted)) <= 1e-5 * np.linalg.norm(np.float64(wanted)), name
    info, right_info = json.loads(info), json.loads(right_info)
    assert info["calibration_slope"] == pytest.approx(right_info["calibration_slope"], rel=1e-3)
    assert info["training"]["positions_seen"] == right_info["training"]["positions_seen"]
    # Started again they change nothing; what only one process can do is refused by all of them.
    finish(*start_together(several, count, **fields))
    for err in finish(*start_together(tmp_path / "cached", count, **SHORT, cache__enabled=True), code=2):
        assert err == f"error: cache.enabled is True with {count} processes; expected one process, or cache.enabled=False\n"


def test_one_process_that_is_asked_to_end_ends_all_at_the_same_step(start_together, tmp_path):
    fields = {"steps": 800, "checkpoint__every": 5000, "evaluation__every": 0, "batch_size": 4}
    whole, output = tmp_path / "whole", tmp_path / "stopped"
    finish(*start_together(whole, 2, **fields))
    processes = start_together(output, 2, **fields)
    wait_until(lambda: (output / "metrics.jsonl").exists() and "\n" in (output / "metrics.jsonl").read_text(), processes[0])
    processes[1].terminate()
    errors = finish(*processes, code=143)
    (step,) = checkpoint_steps(output)
    for err in errors:
        assert f"stopped behind step {step} of 800; the same command goes on from there\n" in err
    finish(*start_together(output, 2, **fields))
    assert result_of(output) == result_of(whole)


def last_line(text: str) -> str:
    return text.splitlines()[-1]


@pytest.mark.parametrize("killed", [0, 1])
def test_one_that_is_killed_ends_all_and_they_go_on_together(start_together, tmp_path, killed):
    """The others stop within seconds and say who is gone; started again, they end with the bytes of a run that nobody killed."""
    fields = {"steps": 200, "checkpoint__every": 5, "evaluation__every": 0, "batch_size": 4}
    whole, output = tmp_path / "whole", tmp_path / "killed"
    finish(*start_together(whole, 2, **fields))
    processes = start_together(output, 2, **fields)
    wait_until(lambda: bool(checkpoint_steps(output)), processes[0])
    processes[killed].kill()
    (err,) = finish(processes[1 - killed], code=1)
    assert "Traceback" not in err
    wanted = rf"error: process {killed} \(.*\) is gone: it was killed, .*; expected all .* start all of them again"
    assert re.fullmatch(wanted, last_line(err)), err
    assert 0 < checkpoint_steps(output)[-1] < 200
    finish(*start_together(output, 2, **fields))
    assert result_of(output) == result_of(whole)


@pytest.mark.parametrize("count", [1, 4])
def test_another_number_of_processes_goes_on_with_the_same_data(start, start_together, tmp_path, count):
    """Killed as two: every step read the same rows, and parameters are within 1e-5 of a run that was never stopped."""
    fields = {"steps": 40, "checkpoint__every": 5, "evaluation__every": 0, "batch_size": 4, "optimizer__learning_rate": 1e-3}
    whole, output = tmp_path / "whole", tmp_path / "killed"
    finish(*start_together(whole, 2, **fields))
    processes = start_together(output, 2, **fields)
    wait_until(lambda: bool(checkpoint_steps(output)), processes[0])
    processes[0].kill()
    finish(processes[1], code=1)
    step = checkpoint_steps(output)[-1]
    assert 0 < step < 40
    errors = finish(start(output, **fields)) if count == 1 else finish(*start_together(output, count, **fields))
    assert f"resumed behind step {step}\n" in errors[0]
    (branch, _, lines), (right, _, right_lines) = result_of(output), result_of(whole)
    for line, wanted in zip(lines, right_lines, strict=True):
        assert (line["step"], line.get("positions")) == (wanted["step"], wanted.get("positions"))
        if "loss" in line:
            assert line["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
    for name, leaf in load(branch).items():
        wanted = load(right)[name]
        assert np.linalg.norm(leaf - np.float64(wanted)) <= 1e-5 * np.linalg.norm(np.float64(wanted)), name


def test_configs_that_differ_and_folders_that_are_not_shared(start_together, tmp_path):
    def refused(**own: Any) -> list[str]:
        errors = finish(*start_together(tmp_path / "run", 2, **SHORT, **own), code=2)
        assert not (tmp_path / "run").exists()
        return errors

    wanted = r"error: process 1 \(.*\) has other settings than process 0 \(.*\): optimizer.learning_rate is 0.5, there 0.001; expected .*\n"
    for err in refused(own={1: ["--config.optimizer.learning_rate=0.5"]}):
        assert re.fullmatch(wanted, err), err
    folders = {i: tmp_path / f"host{i}" for i in range(2)}
    for folder in folders.values():
        folder.mkdir()
    wanted = r"error: output_dir is 'run', where process 1 \(.*\) cannot see what process 0 \(.*\) writes; expected a folder that .*\n"
    for err in refused(output_dir="run", folders=folders):
        assert re.fullmatch(wanted, err), err
    assert not any(list(folder.iterdir()) for folder in folders.values())


def test_processes_killed_together_go_on_together(start_together, tmp_path):
    fields = {"steps": 200, "checkpoint__every": 5, "evaluation__every": 0, "batch_size": 4}
    whole, output = tmp_path / "whole", tmp_path / "killed"
    finish(*start_together(whole, 2, **fields))
    for _ in range(3):
        before = checkpoint_steps(output)
        processes = start_together(output, 2, **fields)
        wait_until(lambda before=before: checkpoint_steps(output) != before, processes[0])
        for process in processes:
            process.kill()
            process.wait()
    assert 0 < checkpoint_steps(output)[-1] < 200
    finish(*start_together(output, 2, **fields))
    assert result_of(output) == result_of(whole)
