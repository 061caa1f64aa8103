"""`infer/generate.py` as several processes: the tokens of one, written once; and the mistakes that are made with several."""

import pathlib

import pods
import pytest
from generate_command import read_output, write_prompts

from eesd_jax.model.exit_branch import init_exit_branch
from eesd_jax.weights import tiny
from eesd_jax.weights.branch_folder import describe, save_branch
from eesd_jax.weights.load import load_model

SCRIPT = "infer/generate.py"
PROMPTS = [{"prompt": "hello there hello"}, {"turns": ["the quick brown", "and then"]}, {"prompt": "a b a b a b"}]
SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> pathlib.Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def branch(tmp_path_factory) -> str:
    """A copy of the last block behind all the others, which drafts what the model would say."""
    folder, model = tmp_path_factory.mktemp("branch"), load_model(tiny.TINY_NAME, "float32")
    last = model.config.num_layers - 1
    made = init_exit_branch(model.config, model.params, last, "last")
    save_branch(
        folder, made, describe(model.config, model.params, made, exit_layer=last, start="last", calibration=(1.0, 0.0), training={})
    )
    return str(folder)


@pytest.fixture
def arguments(tmp_path, monkeypatch, branch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    prompts = write_prompts(PROMPTS)
    return [
        *("--model=tiny", f"--prompts={prompts}", f"--exit_branch={branch}", "--batch_size=2"),
        # The branch alone, as which source drafts depends on how long rounds take here.
        *("--max_new_tokens=16", "--max_draft=2", "--controller=fixed:2", "--arms=exit"),
    ]


def answers(cache: pathlib.Path, count: int, devices: int, *arguments: str) -> list[dict]:
    """What the processes wrote, without what depends on the clock; each process prints what it should."""
    ends = pods.finish(pods.start(SCRIPT, count, *arguments, "--output=answers.jsonl", environment=pods.environment(cache, devices)))
    assert [end.code for end in ends] == [0] * count, ends
    assert ends[0].err.startswith("[")
    assert all((end.out, end.err) == ("", "") for end in ends[1:]), ends
    return [
        {name: value for name, value in line.items() if name != "seconds"}
        for line in read_output(pathlib.Path("answers.jsonl").read_text())
    ]


@pytest.mark.parametrize(
    ("count", "devices", "mesh", "more"),
    [
        (2, 1, "tensor:2", ["--controller=plain"]),
        pytest.param(2, 1, "tensor:2", [], marks=SLOW),
        pytest.param(2, 2, "data:2,tensor:2", [], marks=SLOW),
        pytest.param(4, 1, "fsdp:4", [], marks=SLOW),
        pytest.param(4, 1, "data:2,fsdp:2", ["--controller=plain", "--temperature=0.7", "--stop=e"], marks=SLOW),
        pytest.param(4, 2, "tensor:8", ["--controller=plain"], marks=SLOW),
        pytest.param(2, 1, "tensor:2", ["--controller=cost_aware", "--arms=exit,lookup"], marks=SLOW),
    ],
)
def test_several_processes_write_what_one_does(arguments, cache, count, devices, mesh, more):
    found = answers(cache, count, devices, *arguments, f"--mesh={mesh}", *more)
    expected = answers(cache, 1, 1, *arguments, *more)
    assert len(found) == 4
    if "--controller=cost_aware" in more:  # which drafts as the clock has it
        found, expected = ([line["token_ids"] for line in lines] for lines in (found, expected))
    else:
        assert "plain" in str(more) or sum(line["accepted"] for line in found) > 10
    assert found == expected


def test_what_differs_between_processes_is_said_by_all(arguments, cache):
    processes = pods.start(SCRIPT, 2, *arguments, "--mesh=tensor:2", own={1: ["--temperature=0.5"]}, environment=pods.environment(cache))
    for end in pods.finish(processes):
        assert (end.code, end.out, end.err.count("\n")) == (2, "", 1), end
        assert end.err.startswith("error: process 1 (")
        assert "--temperature is 0.5, there 0.0; expected the same" in end.err


@SLOW
@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--prompt=hello"], "--mesh is '' with 2 processes; expected one over all their devices, as in tensor:2"),
        (["--prompt=hello", "--mesh=tensor:4"], "--mesh is 'tensor:4' with 2 processes; expected one over all"),
        (["--mesh=tensor:2"], "without --prompt or --prompts; expected one of them: a chat is for one process"),
    ],
)
def test_what_several_processes_cannot_do(cache, more, named):
    for end in pods.finish(pods.start(SCRIPT, 2, "--model=tiny", *more, environment=pods.environment(cache))):
        assert (end.code, end.out, end.err.count("\n")) == (2, "", 1), end
        assert named in end.err


@SLOW
def test_a_mistake_of_one_process_ends_all(arguments, cache, tmp_path):
    """Only process 0 writes, and here it cannot."""
    for i, end in enumerate(
        pods.finish(pods.start(SCRIPT, 2, *arguments, "--mesh=tensor:2", "--output=no/such", environment=pods.environment(cache)))
    ):
        assert (end.code, end.out, end.err.count("\n")) == (2, "", 1), end
        assert end.err.startswith("error: cannot write 'no/such'" if i == 0 else "error: process 0 (")
        assert "expected a file in a folder that can be written to" in end.err


@SLOW
def test_a_worker_that_nobody_started(arguments, cache):
    environment = pods.environment(cache)
    for end in pods.finish(pods.start(SCRIPT, 3, *arguments, "--join_timeout=10", missing=[1], environment=environment)):
        assert (end.code, end.out, end.err.count("\n")) == (2, "", 1), end
        assert end.err.startswith("error: not all 3 processes have joined at 'localhost:")
        assert "within 10 s (--join_timeout); expected the same command to be started on every host" in end.err
