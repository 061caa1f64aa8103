"""`infer/generate.py`: answers have the contract's form, to one prompt, to a file of them, and in a chat.

Most cases run the command in this process, a few as a process of its own, in a terminal, or interrupted. What is refused is in
`test_generate_mistakes.py`, what drafts in `test_generate_speculation.py`.
"""

import json
import os
import pathlib
import pty
import re
import signal
import subprocess
import sys
import threading
import time

import commands
import pytest
import surroundings
import tiny
from commands import Result, assert_refused
from generate_command import CONTEXT, FIELDS, PROMPTS, read_output, write_prompts

SCRIPT = commands.ROOT / "infer" / "generate.py"


# Answers -----------------------------------------------------------------------------------------------------------------------------


def test_output_has_one_line_a_turn_with_the_fields_of_the_contract(run, models):
    records = [
        {"id": "two", "category": "x", "turns": ["hello", "there"]},
        {"prompt": "the fox"},
        {"messages": [{"role": "system", "content": "be"}, {"role": "user", "content": "lazy"}]},
    ]
    mask = os.umask(0o027)
    try:
        result = run(f"--model={models['whole']}", f"--prompts={write_prompts(records)}", "--output=out.jsonl", "--max_new_tokens=9")
    finally:
        os.umask(mask)
    assert (result.code, result.out) == (0, "")
    lines = read_output(pathlib.Path("out.jsonl").read_text())
    assert [(line["id"], line["turn"], line["prompt"]) for line in lines] == [
        ("two", 0, "hello"),
        ("two", 1, "there"),
        (2, 0, "the fox"),
        (3, 0, "lazy"),
    ]
    for line in lines:
        assert list(line) == FIELDS
        assert line["text"] == tiny.tokenizer().decode(line["token_ids"], skip_special_tokens=True)
        assert line["new_tokens"] == len(line["token_ids"]) == line["rounds"] <= 9
        assert (line["drafted"], line["accepted"], line["tokens_per_round"]) == (0, 0, 1.0)
        assert line["seconds"] > 0
        assert line["finish_reason"] == ("eos" if line["token_ids"][-1] == tiny.tokenizer().eos_token_id else "length")
    assert f"[4 turns, {sum(line['new_tokens'] for line in lines)} tokens in " in result.err
    assert result.err.count("\n") == 1
    assert sorted(os.listdir()) == ["out.jsonl", "prompts.jsonl"]
    assert pathlib.Path("out.jsonl").stat().st_mode & 0o777 == 0o640


def test_a_later_turn_sees_the_turns_before_it(run, models):
    model, budget = f"--model={models['whole']}", "--max_new_tokens=6"
    asked = read_output(run(model, budget, f"--prompts={write_prompts([{'turns': ['one', 'two', 'three']}])}").out)
    history = []
    for turn in asked:
        history.append({"role": "user", "content": turn["prompt"]})
        alone = read_output(run(model, budget, f"--prompts={write_prompts([{'messages': history}])}").out)
        assert [line["token_ids"] for line in alone] == [turn["token_ids"]]
        history.append({"role": "assistant", "content": turn["text"]})


@pytest.mark.parametrize("sampling", [[], ["--temperature=0.9", "--top_k=50", "--top_p=0.95", "--seed=3"]], ids=["greedy", "sampled"])
def test_batch_size_changes_nothing_but_the_time(run, models, sampling):
    records = [{"turns": [prompt, *PROMPTS[:i]]} for i, prompt in zip((0, 2, 0, 1, 0, 1), PROMPTS, strict=True)]
    arguments = [f"--model={models['whole']}", "--max_new_tokens=8", *sampling, f"--prompts={write_prompts(records)}"]
    one, four = (read_output(run(*arguments, f"--batch_size={size}").out) for size in (1, 4))
    assert len(one) == sum(len(record["turns"]) for record in records)
    assert [line | {"seconds": 0} for line in one] == [line | {"seconds": 0} for line in four]


def test_sampled_records_draw_with_their_own_seed(run, models):
    def token_ids(*arguments: str) -> list:
        result = run(f"--model={models['whole']}", "--max_new_tokens=16", "--temperature=1", *arguments)
        return [line["token_ids"] for line in read_output(result.out)]

    same_prompt = f"--prompts={write_prompts([{'prompt': 'hello'}] * 3)}"
    first, second, third = token_ids(same_prompt)
    assert first != second != third != first
    assert token_ids(same_prompt, "--seed=1")[:2] == [second, third]


def test_a_folder_and_a_gguf_file_of_one_model_answer_alike(run, models):
    answers = [run(f"--model={models[name]}", "--prompt=hello fox", "--max_new_tokens=20").out for name in ("folder", "whole")]
    assert answers[0] == answers[1] != ""


def test_a_mesh_changes_nothing(run, models):
    arguments = [
        f"--model={models['whole']}",
        "--max_new_tokens=8",
        f"--prompts={write_prompts([{'prompt': prompt} for prompt in PROMPTS[:4]])}",
        "--batch_size=4",
    ]
    one, many = (read_output(run(*arguments, *mesh).out) for mesh in ([], ["--mesh=data:2,tensor:2"]))
    assert [line | {"seconds": 0} for line in one] == [line | {"seconds": 0} for line in many]


def test_stdout_is_just_the_text_and_statistics_are_on_stderr(run, models):
    arguments = [f"--model={models['whole']}", "--prompt=hello", "--max_new_tokens=12"]
    plain = run(*arguments, "--output=out.jsonl")
    (line,) = read_output(pathlib.Path("out.jsonl").read_text())
    assert (line["id"], line["turn"], line["prompt"]) == ("prompt", 0, "hello")
    assert (plain.code, plain.out) == (0, line["text"] + "\n")
    assert plain.err.startswith(f"[{line['new_tokens']} tokens in ")
    assert plain.err.endswith(f"ended by {line['finish_reason']}]\n")
    assert plain.err.count("\n") == 1
    for streamed in (run(*arguments, "--stream"), run(*arguments, terminals="out")):
        assert (streamed.code, streamed.out) == (0, plain.out)


def test_plain_text_goes_without_the_template(run, models):
    arguments = ["--prompt=hello", "--max_new_tokens=12"]
    without = run(f"--model={models['no_template']}", *arguments).out
    assert run(f"--model={models['whole']}", "--nochat", *arguments).out == without
    assert run(f"--model={models['whole']}", "--chat", *arguments).out == run(f"--model={models['whole']}", *arguments).out != without


@pytest.mark.parametrize(
    "arguments",
    [["--prompt=hello fox", "--stream"], ["--prompt=hello fox", "--nostream"], ["--prompts=prompts.jsonl"]],
    ids=["streamed", "at_once", "file"],
)
def test_stop_strings_end_the_answer(run, models, arguments):
    write_prompts([{"prompt": "hello fox"}])

    def answer(*more: str) -> dict:
        assert run(f"--model={models['whole']}", "--max_new_tokens=24", "--output=out.jsonl", *arguments, *more).code == 0
        return read_output(pathlib.Path("out.jsonl").read_text())[0]

    text = answer()["text"]
    stop = text[len(text) // 2 :][:2]
    line = answer(f"--stop={stop}", "--stop=never to be seen")
    assert line["text"] == text[: text.index(stop)]
    assert line["finish_reason"] == "stop"
    assert stop in tiny.tokenizer().decode(line["token_ids"])
    assert stop not in tiny.tokenizer().decode(line["token_ids"][:-1])


def test_a_conversation_that_outgrows_the_context_keeps_its_line_and_does_not_stop_the_others(run, models):
    half = "9" * (CONTEXT // 2)
    records = [{"turns": ["a", half, half, "b"]}, {"turns": ["hello", "there"]}]
    arguments = [f"--model={models['whole']}", "--max_new_tokens=4", f"--prompts={write_prompts(records)}"]
    result = run(*arguments, "--batch_size=2")
    lines = read_output(result.out)
    assert result.code == 0
    assert [(line["id"], line["turn"], line["new_tokens"] > 0) for line in lines] == [
        (1, 0, True),
        (1, 1, True),
        (1, 2, False),
        (1, 3, False),
        (2, 0, True),
        (2, 1, True),
    ]
    empty = {"text": "", "token_ids": [], "new_tokens": 0, "rounds": 0, "tokens_per_round": 0.0, "seconds": 0.0, "finish_reason": "length"}
    assert lines[2] | empty == lines[2]
    warnings = [line for line in result.err.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 2
    assert "line 1, turn 3 is left without an answer: prompt has" in warnings[0]
    alone = read_output(run(*arguments).out)
    assert [line["token_ids"] for line in alone] == [line["token_ids"] for line in lines]


def test_a_progress_bar_leaves_the_lines_alone(run, models):
    records = [{"prompt": f"{word} [bold]" * 4} for word in PROMPTS[:3]]
    arguments = [f"--model={models['whole']}", "--max_new_tokens=40", f"--prompts={write_prompts(records)}"]
    shown = run(*arguments, terminals="err")
    assert "generating" in shown.err
    expected = read_output(run(*arguments).out)
    assert [line["token_ids"] for line in read_output(shown.out)] == [line["token_ids"] for line in expected]


def test_output_through_a_link_replaces_the_file_and_leaves_the_link(run, models):
    pathlib.Path("real.jsonl").write_text("old\n")
    os.symlink("real.jsonl", "link.jsonl")
    assert run(f"--model={models['whole']}", "--prompt=hello", "--max_new_tokens=2", "--output=link.jsonl").code == 0
    assert list(read_output(pathlib.Path("real.jsonl").read_text())[0]) == FIELDS
    assert os.path.islink("link.jsonl")
    assert sorted(os.listdir()) == ["link.jsonl", "real.jsonl"]


def test_output_to_a_pipe_does_not_replace_it(run, models):
    os.mkfifo("pipe")
    read = []
    reader = threading.Thread(target=lambda: read.append(pathlib.Path("pipe").read_text()), daemon=True)
    reader.start()
    assert run(f"--model={models['whole']}", "--prompt=hello", "--max_new_tokens=2", "--output=pipe").code == 0
    reader.join(timeout=10)
    assert list(read_output(read[0])[0]) == FIELDS
    assert pathlib.Path("pipe").is_fifo()


def test_help_lists_the_flags_of_this_command(run):
    result = run("--help")
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith("Generates text: ")
    for flag in ("--prompt=...", "--prompts=...", "--[no]chat", "--[no]stream", "--max_new_tokens=256", "--controller=...", "--stop=..."):
        assert f"\n  {flag} " in result.out
    assert max(map(len, result.out.splitlines())) <= 130
    assert "verbosity" not in result.out  # absl's own flags


# Chat --------------------------------------------------------------------------------------------------------------------------------


def test_chat_answers_each_line_of_stdin_with_the_conversation_in_view(run, models):
    stdin = "hello\n\n  there \n/reset\nhello\n/exit\nnever\n"
    result = run(f"--model={models['whole']}", "--max_new_tokens=7", "--output=out.jsonl", stdin=stdin)
    assert result.code == 0
    lines = read_output(pathlib.Path("out.jsonl").read_text())
    assert [(line["id"], line["turn"], line["prompt"]) for line in lines] == [
        ("chat-1", 0, "hello"),
        ("chat-1", 1, "there"),
        ("chat-2", 0, "hello"),
    ]
    assert result.out == "".join(f"{line['text']}\n" for line in lines)
    assert result.err.count("tokens in") == 3
    assert lines[0]["token_ids"] == lines[2]["token_ids"]
    records = [{"turns": ["hello", "there"]}]
    asked = read_output(run(f"--model={models['whole']}", "--max_new_tokens=7", f"--prompts={write_prompts(records)}").out)
    assert [line["token_ids"] for line in lines[:2]] == [line["token_ids"] for line in asked]


def test_chat_goes_on_after_a_message_that_is_too_long(run, models):
    result = run(f"--model={models['whole']}", "--max_new_tokens=3", "--output=out.jsonl", stdin=f"{'9' * CONTEXT}\nhello\n")
    assert result.code == 0
    assert "error: prompt has" in result.err
    assert [line["prompt"] for line in read_output(pathlib.Path("out.jsonl").read_text())] == ["hello"]


def test_chat_refuses_bytes_that_are_no_text(run, models):
    result = run(f"--model={models['whole']}", "--output=out.jsonl", stdin="a\udcff\n")
    assert result.code == 2
    assert result.err.splitlines()[-1] == r"error: message 'a\udcff'; expected UTF-8 text"
    assert os.listdir() == []


# In a process of its own -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    """As a user's, but offline, and with a cache of our own."""
    ours = {"EESD_JAX_CACHE": str(tmp_path_factory.mktemp("cache")), "HF_HUB_OFFLINE": "1", "XLA_FLAGS": surroundings.xla_flags(1)}
    return {name: value for name, value in os.environ.items() if name != "TRANSFORMERS_NO_ADVISORY_WARNINGS"} | ours


def model_of(models: dict[str, str]) -> list[str]:
    return [f"--model={models['whole']}", "--exit_branch=none"]


def test_without_pytorch_the_error_is_still_the_only_line(models, environment, tmp_path):
    # transformers says at import that it misses PyTorch.
    start = f"import runpy, sys; sys.modules['torch'] = None; sys.argv = sys.argv[1:]; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    process = subprocess.run(
        [sys.executable, "-c", start, "generate.py", f"--model={models['half']}", "--prompt=hi", "--output=out.jsonl"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert_refused(Result(process.returncode, process.stdout, process.stderr), "half.gguf", "truncated")
    assert os.listdir(tmp_path) == []


def test_a_reader_that_leaves_early_is_no_error(models, environment, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "hello"}\n' * 400)  # more than a pipe holds
    process = subprocess.Popen(
        [sys.executable, SCRIPT, *model_of(models), f"--prompts={prompts}", "--controller=plain", "--max_new_tokens=1", "--batch_size=200"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    line = process.stdout.readline()
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == ("", 1)
    process.stderr.close()
    assert list(json.loads(line)) == FIELDS


def test_sigint_while_waiting_for_a_message(models, environment, tmp_path, heeds_sigint):
    process = subprocess.Popen(
        [sys.executable, SCRIPT, *model_of(models), "--controller=plain", "--max_new_tokens=2", "--output=out.jsonl"],
        cwd=tmp_path,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdin.write("hello\n")
    process.stdin.flush()
    answer = process.stdout.readline()
    shown = [process.stderr.readline()]
    while "tokens in" not in shown[-1]:  # the statistics, behind which it waits
        shown.append(process.stderr.readline())
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert answer.endswith("\n")
    assert out == ""
    assert shown[0].startswith("Chat with ")
    assert "Traceback" not in "".join(shown) + err
    assert os.listdir(tmp_path) == ["out.jsonl"]
    assert [line["text"] for line in read_output((tmp_path / "out.jsonl").read_text())] == [answer.removesuffix("\n")]


def test_chat_in_a_terminal(models, environment, tmp_path):
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, SCRIPT, *model_of(models), "--max_new_tokens=20", "--controller=plain"],
        cwd=tmp_path,
        env=environment | {"TERM": "dumb"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    watch = threading.Timer(120, process.kill)
    watch.start()
    shown = b""
    for message in (b"hello\r", b"\x04"):  # Ctrl-D leaves
        while not shown.endswith(b"> "):
            shown += os.read(ours, 4096)
        os.write(ours, message)
        shown += os.read(ours, 4096)
    try:
        while piece := os.read(ours, 4096):
            shown += piece
    except OSError:  # closed at the other end
        pass
    assert process.wait() == 0
    watch.cancel()
    os.close(ours)
    _, blanks, text = shown.decode().replace("\r\n", "\n").split("\r", 2)  # "loading ..." is wiped out
    assert not blanks.strip()
    greeting = f"Chat with {models['whole']}. /reset starts again; /exit or end of input leaves.\n\n> hello\n"
    assert text.startswith(greeting)
    assert re.fullmatch(r".+\n\[\d+ tokens in [^\n]*\]\n\n> \n", text.removeprefix(greeting), re.DOTALL)
