"""Commands whose streams are closed or full, whose platform is not there, or whose cache cannot be written: one line, or an answer.

Processes of their own, for streams are theirs; most end before anything slow is imported.
"""

import json
import os
import pathlib
import subprocess
import sys

import commands
import pytest

SCRIPTS = ["infer/generate.py", "infer/benchmark.py", "train/self_generate.py", "train/distill.py", "train/ngrams.py", "train/plan.py"]
ANSWER = ["--model=tiny", "--prompt=hi", "--max_new_tokens=3", "--exit_branch=none", "--controller=plain"]
CONFIG = f"--config={commands.ROOT / 'configs' / 'tiny.py'}"


def run(folder: pathlib.Path, redirection: str, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """As a shell runs it with that redirection, which names `"$@"`, the command."""
    ours = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_PLATFORMS", "JAX_COMPILATION_CACHE_DIR")}
    ours |= {"EESD_JAX_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"} | environment
    command = [sys.executable, str(commands.ROOT / script), *arguments]
    return subprocess.run(
        ["sh", "-c", f'"$@" {redirection}', "sh", *command], cwd=folder, env=ours, capture_output=True, text=True, timeout=300, check=False
    )


def one_line(result: subprocess.CompletedProcess, *named: str) -> None:
    assert (result.returncode, result.stderr.count("\n")) == (2, 1), result
    assert result.stderr.startswith("error: ")
    for text in named:
        assert text in result.stderr


@pytest.mark.parametrize("redirection", [">&-", "2>&-", "<&-", ">&- 2>&-", "<&- >&- 2>&-", "2>/dev/full"])
@pytest.mark.parametrize("script", SCRIPTS[:1])
def test_help_and_mistakes_need_no_streams(tmp_path, script, redirection):
    assert run(tmp_path, redirection, script, "--help").returncode == 0
    wrong = run(tmp_path, redirection, script, "--nosuch=1", *([CONFIG] if script.startswith("train/") else []))
    assert wrong.returncode == 2
    if "2>" in redirection:
        assert (wrong.stdout, wrong.stderr) == ("", "")
    else:
        one_line(wrong, "nosuch")


@pytest.mark.slow
@pytest.mark.parametrize("redirection", [">&-", "2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize("script", SCRIPTS[1:])
def test_no_command_needs_streams(tmp_path, script, redirection):
    test_help_and_mistakes_need_no_streams(tmp_path, script, redirection)


def test_help_that_cannot_be_printed_is_one_line(tmp_path):
    one_line(run(tmp_path, ">/dev/full", SCRIPTS[0], "--help"), "cannot write stdout (No space left on device)")


@pytest.mark.parametrize(
    "arguments", [ANSWER, ["--model=tiny", "--prompts=prompts.jsonl"], ["--model=tiny"]], ids=["prompt", "file", "chat"]
)
def test_answers_that_nobody_would_get_are_refused_before_they_are_made(tmp_path, arguments):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "hi"}')
    one_line(run(tmp_path, ">&-", SCRIPTS[0], *arguments), "stdout is closed, and --output is not given", "expected one of them")


def test_a_platform_that_is_not_there_is_one_line(tmp_path):
    result = run(tmp_path, "", SCRIPTS[0], *ANSWER, "--output=out.jsonl", JAX_PLATFORMS="cuda")
    one_line(result, "JAX_PLATFORMS is 'cuda'", "the extra 'cuda'", "expected cpu")
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["cuda", "tpu", "nosuch", "nosuch,cpu", "rocm"])
@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        (SCRIPTS[0], ANSWER),
        (SCRIPTS[1], ["--model=tiny", "--prompts=prompts.jsonl", "--controllers=plain", "--output_dir=out"]),
        (SCRIPTS[2], [CONFIG, "--config.output_dir=run"]),
        (SCRIPTS[3], [CONFIG, "--config.output_dir=run"]),
    ],
    ids=SCRIPTS[:4],
)
def test_every_command_names_the_platforms(tmp_path, script, arguments, platform):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "hi"}')
    result = run(tmp_path, "", script, *arguments, JAX_PLATFORMS=platform)
    one_line(result, f"JAX_PLATFORMS is {platform!r}", "expected cpu")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("redirection", [">&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_answers_go_to_their_file_where_streams_are_closed(tmp_path, redirection):
    result = run(tmp_path, redirection, SCRIPTS[0], *ANSWER, "--output=out.jsonl")
    assert result.returncode == 0, result
    (line,) = (tmp_path / "out.jsonl").read_text().splitlines()
    assert json.loads(line)["new_tokens"] == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("redirection", "more", "named"),
    [
        (">/dev/full", ANSWER, "cannot write"),
        (">/dev/full", [*ANSWER, "--stream"], "cannot write"),
        (">/dev/full", [*ANSWER[:1], *ANSWER[2:], "--prompts=prompts.jsonl"], "cannot write stdout"),
        ("", [*ANSWER, "--output=/dev/full"], "cannot write '/dev/full'"),
        ("", [*ANSWER[:1], *ANSWER[2:], "--prompts=prompts.jsonl", "--output=/dev/full"], "cannot write '/dev/full'"),
    ],
)
def test_a_full_stdout_or_device_is_one_line(tmp_path, redirection, more, named):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "hi"}\n{"prompt": "there"}')
    result = run(tmp_path, redirection, SCRIPTS[0], *more)
    assert result.returncode == 2, result
    assert "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith(f"error: {named}")
    assert "No space left on device" in result.stderr


@pytest.mark.slow
def test_a_cache_that_cannot_be_written_is_said_in_a_line_each(tmp_path):
    drafting = [argument for argument in ANSWER if "controller" not in argument and "branch" not in argument]
    result = run(tmp_path, "", SCRIPTS[0], *drafting, EESD_JAX_CACHE="/proc/nosuch")
    assert result.returncode == 0, result
    told = [line for line in result.stderr.splitlines() if "/proc/nosuch" in line]
    assert [line.startswith("warning: ") for line in told] == [True, True], result.stderr
    assert "compiled at every start" in told[0]
    assert "what rounds cost is not kept" in told[1]
    assert result.stderr.count("\n") == 4  # beside these: no branch comes with the model, and the statistics
