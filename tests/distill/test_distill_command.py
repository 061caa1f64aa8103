"""`train/distill.py`: every mistake is one line and exit code 2 with nothing left behind; the rest of the command's contract.

The command runs in this process, on its eight devices; `test_distill_processes.py` starts it for real.
"""

import functools
import json
import os
import pathlib
import shutil

import commands
import jax
import numpy as np
import pytest
from experiments import write_dataset

from eesd_jax.weights import branch_folder, tiny

CONFIG = """
from eesd_jax.distill.experiment import base_config

def get_config():
    config = base_config()
    config.model = "tiny"
    config.output_dir = "run"
    config.steps = 2
    config.batch_size = 8
    config.data.path = {dataset!r}
    config.data.sequence_length = 64
    config.branch.exit_layer = 2
    config.loss.chunk = 64
    config.evaluation.rollouts = 0
    return config
"""

BASE = "from eesd_jax.distill.experiment import base_config\n\ndef get_config():\n    config = base_config()\n    {}\n    return config\n"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> str:
    return write_dataset(tmp_path_factory.mktemp("data") / "dataset")


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch, commands.loaded("train/distill.py") as module:
        patch.setenv("EESD_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield module


@pytest.fixture
def run(command, dataset, monkeypatch, tmp_path):
    """Runs the command in this process, in a folder that holds nothing but `config.py`."""
    monkeypatch.chdir(tmp_path)
    pathlib.Path("config.py").write_text(CONFIG.format(dataset=dataset))
    return functools.partial(commands.run, command)


def assert_refused(result: commands.Result, *named: str, left: tuple[str, ...] = ("config.py",)) -> None:
    """As `commands.assert_refused`, and no files are there but those."""
    commands.assert_refused(result, *named)
    assert tuple(sorted(os.listdir())) == left


# What is wrong without a look at the model -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--config.nosuch=1"], ["--config.nosuch", "no field 'nosuch'", "expected one of", "optimizer"]),
        (["--config.optimizer.rate=1"], ["no field 'rate'", "expected one of", "learning_rate"]),
        (["--config.seed.x=1"], ["no field 'x'", "it has no fields of its own"]),
        (["--config.optimizer=1"], ["--config.optimizer is a group of fields", "learning_rate"]),
        (["--config.steps=many"], ["--config.steps is 'many'", "expected an integer"]),
        (["--config.steps=1.5"], ["--config.steps is '1.5'", "expected an integer"]),
        (["--config.optimizer.learning_rate=fast"], ["learning_rate is 'fast'", "expected a number"]),
        (["--config.cache.enabled=perhaps"], ["cache.enabled is 'perhaps'", "expected true or false"]),
        (["--config.self_generate.temperatures=warm"], ["temperatures", "warm"]),
        (["--nosuch=1"], ["nosuch", "--help"]),
        (["again"], ["unexpected argument 'again'"]),
        (["--config.steps=0"], ["steps is 0", "expected an integer >= 1"]),
        (["--config.batch_size=0"], ["batch_size is 0", "expected an integer >= 1"]),
        (["--config.output_dir="], ["output_dir is empty", "expected a folder"]),
        (["--config.output_dir=config.py"], ["output_dir is 'config.py', which is a file", "expected a folder"]),
        (["--config.output_dir=s3x://a/b"], ["output_dir is 's3x://a/b', which cannot be read", "expected a folder"]),
        (["--config.data.path=s3x://a/b"], ["data.path is 's3x://a/b', which cannot be read", "expected a folder"]),
        (["--config.dtype=float64"], ["dtype is 'float64'", "expected float32, bfloat16"]),
        (["--config.optimizer.accumulate=3"], ["batch_size is 8", "multiple of optimizer.accumulate, 3"]),
        (["--config.optimizer.accumulate=0"], ["optimizer.accumulate is 0", "expected an integer >= 1"]),
        (["--config.optimizer.learning_rate=-1"], ["optimizer.learning_rate is -1.0", "expected a number >= 0"]),
        (["--config.optimizer.learning_rate=nan"], ["optimizer.learning_rate is nan", "expected a number >= 0"]),
        (["--config.optimizer.beta2=1"], ["optimizer.beta2 is 1.0", "expected a number from 0 below 1"]),
        (["--config.loss.chunk=0"], ["loss.chunk is 0", "expected an integer >= 1"]),
        (["--config.loss.soft=0"], ["the weights of all losses are 0", "soft"]),
        (["--config.loss.soft=-1"], ["loss.soft is -1.0", "expected a weight >= 0"]),
        (["--config.checkpoint.every=0"], ["checkpoint.every is 0", "expected an integer >= 1"]),
        (["--config.checkpoint.keep=0"], ["checkpoint.keep is 0", "expected an integer >= 1"]),
        (["--config.evaluation.rollout_tokens=0"], ["evaluation.rollout_tokens is 0", "expected an integer >= 1"]),
        (["--config.cache.dtype=int8"], ["cache.dtype is 'int8'", "expected float16 or float32"]),
        (["--config.branch.save_dtype=int4"], ["branch.save_dtype is 'int4'", "expected float32, float16, bfloat16 or int8"]),
        (["--config.loss.passes=2"], ["loss.passes is 2 without branch.deep_input", "expected 1"]),
        (["--config.mesh.data=3"], ["mesh is data 3 x fsdp 1 x tensor 1", "expected 8, all that there are"]),
        (["--config.mesh.fsdp=3"], ["mesh is data -1 x fsdp 3 x tensor 1", "the number of devices is 8"]),
        (["--config.mesh.fsdp=-1"], ["mesh is data -1 x fsdp -1 x tensor 1", "one axis at most"]),
        (["--config.mesh.fsdp=0"], ["mesh is data -1 x fsdp 0 x tensor 1", "expected positive sizes"]),
        (["--config.batch_size=6"], ["batch_size is 6", "a multiple of 8, the mesh's data x fsdp"]),
        (["--config.optimizer.accumulate=2"], ["batch_size is 8 in 2 parts of 4", "a multiple of 8"]),
        (["--config.data.path=nosuch"], ["dataset 'nosuch'", "no such folder", "expected what train/self_generate.py"]),
        (["--config.data.path="], ["dataset 'run/dataset'", "no such folder"]),
        (["--coordinator_address=localhost:1"], ["without --num_processes and --process_id", "all three"]),
        (["--num_processes=2", "--process_id=0"], ["without --coordinator_address", "all three"]),
        (["--num_processes=two"], ["--num_processes is 'two'", "expected an integer"]),
        (
            ["--coordinator_address=localhost:1", "--num_processes=2", "--process_id=2"],
            ["--process_id is 2", "expected 0 to 1"],
        ),
        (
            ["--coordinator_address=localhost:1", "--num_processes=0", "--process_id=0"],
            ["--num_processes is 0", "expected an integer >= 1"],
        ),
    ],
)
def test_mistakes_that_need_no_model(run, monkeypatch, arguments, named):
    monkeypatch.setattr("eesd_jax.distill.trainer.load_model", None)
    assert_refused(run("--config=config.py", *arguments), *named)


def test_a_config_file_is_needed(run):
    assert_refused(run(), "--config is missing", "expected --config=FILE")
    assert_refused(run("--config="), "--config is ''", "no such file")
    assert_refused(run("--config=nosuch.py"), "--config is 'nosuch.py'", "no such file", "expected a config file")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("def get_config(:\n", ["config.py, line 1: SyntaxError: invalid syntax"]),
        ("import nosuch\n", ["config.py, line 1: ModuleNotFoundError: No module named 'nosuch'"]),
        ("x = 1\n", ["config.py has no get_config", "expected a function get_config()"]),
        ("def get_config():\n    raise KeyError('sorry')\n", ["config.py, line 2: KeyError: 'sorry'; expected a function"]),
        ("def get_config():\n    raise OSError('no disk')\n", ["config.py, line 2: OSError: no disk; expected"]),
        ("def get_config():\n    return 3\n", ["config.py", "get_config() gives 3", "expected a function get_config()"]),
        ("def get_config():\n    return None\n", ["config.py", "get_config() gives None", "expected a function get_config()"]),
        (BASE.format("config.nosuch = 1"), ["config.py: there is no field nosuch", "expected one of"]),
        (BASE.format("config.optimiser.x = 1"), ["config.py, line 5: AttributeError", "optimiser"]),
        (BASE.format("config.steps = 'ten'"), ["config.py, line 5: TypeError", "steps"]),
        (BASE.format("config.optimizer = 3"), ["config.py, line 5: TypeError", "optimizer"]),
    ],
)
def test_broken_config_files(run, text, named):
    pathlib.Path("config.py").write_text(text)
    assert_refused(run("--config=config.py"), *named)


def test_a_cache_is_for_one_process(run, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    named = ["cache.enabled is True with 2 processes", "expected one process, or cache.enabled=False"]
    assert_refused(run("--config=config.py", "--config.cache.enabled=true"), *named)


def test_a_cache_is_on_this_machine(run):
    named = ["the cache would be in 'gs://bucket/x'", "expected a folder of this machine as cache.path"]
    assert_refused(run("--config=config.py", "--config.cache.enabled=true", "--config.cache.path=gs://bucket/x"), *named)


# What is wrong with model and data --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--config.model=nosuch/"], ["nosuch/"]),
        (["--config.output_dir=config.py/run"], ["output_dir 'config.py/run' cannot be made", "expected a folder to write to"]),
        (["--config.branch.exit_layer=0"], ["exit_layer is 0", "expected 1 to 3 for a model of 4 blocks"]),
        (["--config.branch.exit_layer=4"], ["exit_layer is 4", "expected 1 to 3"]),
        (["--config.branch.start=first"], ["start of the exit branch is 'first'", "expected one of last, next, zero"]),
        (["--config.branch.draft_vocab=105"], ["branch.draft_vocab is 105", "expected 0 (all) to 104"]),
        (["--config.branch.draft_vocab=-1"], ["branch.draft_vocab is -1", "expected 0 (all) to 104"]),
        (["--config.data.sequence_length=2000"], ["data.sequence_length is 2000", "at most 1024"]),
        (["--config.data.sequence_length=1"], ["data.sequence_length is 1", "expected an integer >= 2"]),
        (
            ["--config.cache.enabled=true", "--config.loss.reverse_kl=1"],
            ["loss.reverse_kl needs the whole distribution", "keeps 16 tokens"],
        ),
        (["--config.cache.enabled=true", "--config.cache.top_tokens=0"], ["cache.top_tokens is 0", "expected 1 to 104"]),
    ],
)
def test_mistakes_about_the_model(run, arguments, named):
    assert_refused(run("--config=config.py", *arguments), *named)


def test_data_that_cannot_be_trained_on(run):
    os.mkdir("empty")
    left = ("config.py", "empty")
    assert_refused(run("--config=config.py", "--config.data.path=empty"), "dataset 'empty'", "holds no dataset", left=left)
    pathlib.Path("chats.jsonl").write_text('{"messages": []}\n')
    left = ("chats.jsonl", *left)
    assert_refused(run("--config=config.py", "--config.data.path=chats.jsonl"), "line 1", "no messages", left=left)


def test_a_run_its_result_and_what_may_not_follow_it(run, monkeypatch):
    result = run("--config=config.py")
    assert result.code == 0, result.err
    assert result.out.startswith("2 steps done (loss ")
    assert result.out.endswith("; the exit branch is in run/exit_branch\n")
    assert result.err.startswith("step 2: loss ")
    assert result.err.count("\n") == 1
    written = {"checkpoints", "exit_branch", "metrics.jsonl", "tensorboard", "training.png"}
    assert set(os.listdir("run")) == written
    assert set(os.listdir("run/exit_branch")) == {branch_folder.TENSORS_NAME, branch_folder.INFO_NAME}
    assert pathlib.Path("run/training.png").read_bytes().startswith(b"\x89PNG")
    again = run("--config=config.py")
    assert again == (0, result.out, "")

    left, other = ("config.py", "run"), "expected the same config, or another output_dir"
    named = ["run holds another experiment: branch.exit_layer was 2 and is now 1; optimizer.learning_rate was 0.001 and is now 0.1", other]
    changes = ["--config.optimizer.learning_rate=0.1", "--config.branch.exit_layer=1"]
    assert_refused(run("--config=config.py", *changes), *named, left=left)
    info = pathlib.Path("run/exit_branch") / branch_folder.INFO_NAME
    info.write_text(json.dumps(json.loads(info.read_text()) | {"training": {}}))
    assert_refused(run("--config=config.py"), "config.json is not of a training run", "expected another output_dir", left=left)

    shutil.rmtree("run/exit_branch")  # now its checkpoints speak for it
    assert_refused(run("--config=config.py", *changes), *named, left=left)
    with monkeypatch.context() as patch:
        patch.setattr(tiny.RandomSource, "read", lambda source, name: np.full(source.shapes[name], 0.01, np.float32))
        assert_refused(run("--config=config.py"), "run holds another experiment: model.fingerprint was '", other, left=left)
    (state,) = pathlib.Path("run/checkpoints/2/state").glob("ocdbt.process_0/d/*")
    state.write_bytes(state.read_bytes()[:100])
    assert_refused(run("--config=config.py"), "checkpoint", "run/checkpoints", "2", "cannot be read", left=left)
