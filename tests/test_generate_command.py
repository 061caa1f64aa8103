"""`infer/generate.py`: every mistake is one line and exit code 2 with nothing left behind; answers have the contract's form.

Most cases run the command in this process, a few as a process of its own, in a terminal, or interrupted.
"""

import dataclasses
import functools
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
import tiny
from commands import Result, assert_refused

from eesd_jax import engine
from eesd_jax.engine import Engine
from eesd_jax.model.exit_branch import init_exit_branch
from eesd_jax.weights.branch_folder import describe, save_branch

SCRIPT = commands.ROOT / "infer" / "generate.py"
FIELDS = [
    *("id", "turn", "prompt", "text", "token_ids", "new_tokens"),
    *("rounds", "drafted", "accepted", "tokens_per_round", "seconds", "finish_reason"),
]
CONTEXT = tiny.hf_config()["max_position_embeddings"]
PROMPTS = ("hello", "the quick brown fox jumps", "a", "12 345\nlazy dog", "there: don't", "日本")


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch, commands.loaded("infer/generate.py") as module:
        patch.setenv("EESD_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield module


@pytest.fixture
def run(command, monkeypatch, tmp_path):
    """Runs the command in this process, in an empty folder; as if with --exit_branch=none, which warns of nothing, and without lookup."""
    monkeypatch.chdir(tmp_path)
    return functools.partial(commands.run, command, "--exit_branch=none", "--arms=exit")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    """Folders and files of models, whole and damaged."""
    base = tmp_path_factory.mktemp("models")
    hf = tiny.hf_config()
    tiny.write_folder(base / "folder", hf, with_tokenizer=True)
    whole = tiny.write_gguf(base / "whole.gguf", hf)
    tiny.write_gguf(base / "no_template.gguf", hf, fields={"tokenizer.chat_template": None})
    (base / "half.gguf").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    truncated = tiny.write_folder(base / "truncated", hf, shards=2, with_tokenizer=True)
    shard = truncated / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    no_weights = tiny.write_folder(base / "no_weights", hf, with_tokenizer=True)
    (no_weights / "model.safetensors").unlink()
    (base / "empty").mkdir()
    (base / "notes.txt").write_text("no model")
    return {path.name.removesuffix(".gguf"): str(path) for path in base.iterdir()}


def write_prompts(records: list, name: str = "prompts.jsonl") -> str:
    """A prompt file in the current folder."""
    pathlib.Path(name).write_text("".join(json.dumps(record) + "\n" for record in records))
    return name


def read_output(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


# What is wrong without a look at the model -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--temperature=-1"], ["temperature is -1.0", "expected a finite number >= 0"]),
        (["--temperature=nan"], ["temperature is nan", "expected a finite number >= 0"]),
        (["--top_k=-1"], ["top_k is -1", "expected an integer >= 0"]),
        (["--top_p=0"], ["top_p is 0.0", "expected a number in (0, 1]"]),
        (["--top_p=1.5"], ["top_p is 1.5", "expected a number in (0, 1]"]),
        (["--min_p=1"], ["min_p is 1.0", "expected a number in [0, 1)"]),
        (["--max_new_tokens=0"], ["--max_new_tokens is 0", "expected an integer >= 1"]),
        (["--batch_size=0"], ["--batch_size is 0", "expected an integer >= 1"]),
        (["--controller=nosuch"], ["--controller is 'nosuch'", "expected one of", "plain"]),
        (["--controller=fixed:9"], ["--controller is 'fixed:9'", "max_draft, which is 8"]),
        (["--controller=threshold:2"], ["--controller is 'threshold:2'", "expected a threshold from 0 to 1"]),
        (["--controller=beta"], ["--controller is 'beta'", "--exit_branch is 'none'", "expected --controller=plain, or --exit_branch"]),
        (
            ["--controller=beta", "--exit_branch=auto", "--model=a/b"],
            ["--controller is 'beta'", "none comes with model 'a/b'", "expected --controller=plain, or --exit_branch"],
        ),
        (["--max_draft=0"], ["--max_draft is 0", "expected an integer >= 1"]),
        (["--compare"], ["--controller is 'cost_aware'", "needs an exit branch", "--exit_branch is 'none'"]),
        (
            ["--compare", "--exit_branch=auto", "--controller=plain"],
            ["--compare is given with --controller=plain", "expected a controller"],
        ),
        (["--mesh=tensor"], ["--mesh is 'tensor'", "expected AXIS:SIZE", "tensor:4"]),
        (["--mesh=tensor:0"], ["--mesh is 'tensor:0'", "expected AXIS:SIZE"]),
        (["--mesh=tensor:2,tensor:2"], ["--mesh is 'tensor:2,tensor:2'", "at most once"]),
        (["--mesh=pipeline:2"], ["--mesh is 'pipeline:2'", "each of data, fsdp, tensor"]),
        (["--mesh=data:2"], ["--batch_size is 1", "expected a multiple of 2"]),
        (["--mesh=tensor:9", "--model=tiny", "--controller=plain"], ["a mesh of 1 x 1 x 9 needs 9 devices; there are 8"]),
        (["--stop="], ["--stop is ''", "expected some text"]),
        (["--top_k=abc"], ["--top_k is 'abc'", "expected an integer"]),
        (["--top_k=1.5"], ["--top_k is '1.5'", "expected an integer"]),
        (["--temperature=hot"], ["--temperature is 'hot'", "expected a number"]),
        (["--stream=maybe"], ["--stream is 'maybe'", "expected true or false"]),
        (["--max_new_token=5"], ["'max_new_token'", "Did you mean", "max_new_tokens", "--help lists all flags"]),
        (["--output"], ["Missing value for flag --output"]),
        (["hello"], ["unexpected argument 'hello'", "expected --flag=value"]),
        (["--prompts=good.jsonl"], ["--prompt is 'hi'", "--prompts is 'good.jsonl'", "expected only one"]),
        (["--prompt="], ["--prompt is ''", "expected a text"]),
        (["--prompt= \n"], ["--prompt is", "expected a text"]),
        (["--prompt=a\udcff"], [r"--prompt is 'a\udcff'", "expected a text"]),
        (["--output=nosuch/out.jsonl"], ["cannot write 'nosuch/out.jsonl'", "No such file or directory", "expected a file in a folder"]),
        (["--output=."], ["cannot write '.'", "it is a folder"]),
    ],
    ids=lambda value: value[0].partition("\n")[0] if value[0].isascii() else "surrogate",
)
def test_bad_flags_are_refused_before_the_model_is_loaded(run, monkeypatch, arguments, named):
    monkeypatch.setattr(engine, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    write_prompts([{"prompt": "hi"}], "good.jsonl")
    assert_refused(run("--prompt=hi", *arguments), *named)
    assert os.listdir() == ["good.jsonl"]


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (None, ["'prompts.jsonl'", "no such file"]),
        ("", ["'prompts.jsonl' is empty", "expected one JSON object a line"]),
        ("\n\n", ["'prompts.jsonl' is empty"]),
        ('{"prompt": "a"}\n{"prompt": "b"\n', ["'prompts.jsonl', line 2: not valid JSON", "expected"]),
        ('{"prompt": "a"}\n\n{"turns": []}\n', ["line 3", "turns is empty"]),
    ],
    ids=["missing", "empty", "blank", "bad_json", "no_turns"],
)
def test_bad_prompt_files_are_refused_before_the_model_is_loaded(run, monkeypatch, content, named):
    monkeypatch.setattr(engine, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    if content is not None:
        pathlib.Path("prompts.jsonl").write_text(content)
    before = os.listdir()
    assert_refused(run("--prompts=prompts.jsonl", "--output=out.jsonl"), *named)
    assert os.listdir() == before


def test_the_prompt_file_is_not_overwritten_by_the_output(run):
    prompts = write_prompts([{"prompt": "a"}])
    assert_refused(run(f"--prompts={prompts}", f"--output={os.path.abspath(prompts)}"), "--output is", "expected another file")
    assert pathlib.Path(prompts).read_text() == '{"prompt": "a"}\n'


def test_a_chat_cannot_go_without_a_template(run, models):
    assert_refused(run("--nochat"), "--nochat is given without --prompt", "expected")
    assert_refused(run(f"--model={models['no_template']}", stdin="hi\n"), "no chat template", "expected --prompt or --prompts")
    for more in ("--prompt=hi", f"--prompts={write_prompts([{'prompt': 'hi'}])}"):
        assert_refused(run(f"--model={models['no_template']}", "--chat", more), "--chat is given", "no chat template", "expected --nochat")


# What the model shows ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "named"),
    [
        ("nosuch/model", ["model 'nosuch/model'", "expected demo, an existing folder, a .gguf file or a hub id"]),
        ("no-such-model", ["model 'no-such-model'", "expected demo, an existing folder, a .gguf file or a hub id"]),
        ("bad//id", ["model 'bad//id'"]),
        ("/nosuch/folder", ["model '/nosuch/folder'", "no such file or folder"]),
        ("nosuch.gguf", ["model 'nosuch.gguf'", "no such file or folder"]),
        ("{notes.txt}", ["notes.txt", "expected demo, a folder, a .gguf file or a hub id"]),
        ("{empty}", ["empty", "config.json", "expected a Hugging Face model folder"]),
        ("{no_weights}", ["no_weights", "no weights", "expected model.safetensors"]),
        ("{truncated}", ["model-00002-of-00002.safetensors", "truncated"]),
        ("{half}", ["half.gguf", "truncated"]),
    ],
)
def test_bad_models_are_refused_and_leave_nothing(run, models, model, named):
    name = models[model[1:-1]] if model.startswith("{") else model
    assert_refused(run(f"--model={name}", "--prompt=hi", "--output=out.jsonl"), *named)
    assert os.listdir() == []


def test_unknown_dtype(run, models):
    assert_refused(run(f"--model={models['whole']}", "--prompt=hi", "--dtype=int8"), "dtype is 'int8'", "expected float32 or bfloat16")


def test_prompt_too_long_for_the_context(run, models):
    result = run(f"--model={models['whole']}", f"--prompt={'9 ' * CONTEXT}", "--output=out.jsonl")
    assert_refused(result, "prompt has", "tokens", f"context is {CONTEXT}")
    assert os.listdir() == []


@pytest.mark.parametrize("model", ["whole", "no_template"])
@pytest.mark.parametrize(
    ("record", "turn"),
    [
        ({"prompt": "9" * CONTEXT}, 1),
        ({"turns": ["a", "b", "9" * CONTEXT, "c"]}, 3),
        (
            {
                "messages": [
                    {"role": "user", "content": "9" * CONTEXT},
                    {"role": "assistant", "content": "a"},
                    {"role": "user", "content": "b"},
                ]
            },
            1,
        ),
    ],
    ids=["prompt", "third_turn", "history"],
)
def test_a_record_that_can_not_fit_is_named_before_anything_is_generated(run, models, monkeypatch, model, record, turn):
    monkeypatch.setattr(Engine, "generate_ids", lambda *_, **__: pytest.fail("something was generated"))
    prompts = write_prompts([{"prompt": "a"}, record, {"prompt": "b"}])
    result = run(f"--model={models[model]}", f"--prompts={prompts}", "--output=out.jsonl")
    assert_refused(result, f"prompt file 'prompts.jsonl', line 2, turn {turn}: prompt has", f"context is {CONTEXT}")
    assert os.listdir() == [prompts]


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


# Speculation -------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def branches(tmp_path_factory) -> dict[str, str]:
    """Folders of exit branches behind all blocks but one: a copy of that one, which drafts what the model would say, and others."""
    base, config = tmp_path_factory.mktemp("branches"), tiny.config()
    params = tiny.params(config)
    branch = init_exit_branch(config, params, config.num_layers - 1, "last")
    about = {"exit_layer": config.num_layers - 1, "start": "last", "calibration": (1.0, 0.0)}
    for name, training in (("good", {"steps": 1}), ("untrained", {})):
        save_branch(base / name, branch, describe(config, params, branch, training=training, **about))
    other = describe(config, tiny.params(config, seed=1), branch, training={"steps": 1}, **about)
    save_branch(base / "of_other_weights", branch, other)
    save_branch(base / "of_another_size", branch, dataclasses.replace(other, hidden_size=64))
    (base / "empty").mkdir()
    return {path.name: str(path) for path in base.iterdir()}


def speculating(models: dict[str, str], branch: str) -> list[str]:
    """Arguments; all tests with them run the same compiled programs."""
    return [f"--model={models['whole']}", f"--exit_branch={branch}", "--max_draft=2", "--max_new_tokens=24", "--controller=beta"]


def test_nothing_is_compiled_twice(run, models, branches):
    arguments = [*speculating(models, branches["good"]), "--prompt=hello", "--stream", "--temperature=0.7"]
    programs = (engine._prefill, engine._start_drafting, engine._decode_speculative)
    before = [program._cache_size() for program in programs]
    text = run(*arguments).out  # many calls of the loop
    compiled = [program._cache_size() for program in programs]
    assert all(now <= earlier + 1 for now, earlier in zip(compiled, before, strict=True))
    assert run(*arguments, f"--stop={text[3:5]}").out != text  # the host ends the row
    assert [program._cache_size() for program in programs] == compiled


def test_a_branch_changes_the_rounds_and_not_the_answers(run, models, branches):
    arguments = [*speculating(models, branches["good"]), f"--prompts={write_prompts([{'turns': [p, 'a']} for p in PROMPTS[:3]])}"]
    plain, result = run(*arguments, "--controller=plain"), run(*arguments)
    ours = read_output(result.out)
    for line, expected in zip(ours, read_output(plain.out), strict=True):
        assert list(line) == FIELDS
        unlike = {"rounds", "drafted", "accepted", "tokens_per_round", "seconds"}
        assert {name: value for name, value in line.items() if name not in unlike} == {
            name: value for name, value in expected.items() if name not in unlike
        }
        assert 0 < line["accepted"] == line["drafted"]
        assert line["rounds"] < line["new_tokens"] <= line["rounds"] + line["accepted"]
        assert line["tokens_per_round"] == line["new_tokens"] / line["rounds"]
    rounds, tokens, drafted = (sum(line[name] for line in ours) for name in ("rounds", "new_tokens", "drafted"))
    assert f"; {rounds} rounds, {tokens / rounds:.2f} tokens per round, {drafted} of {drafted} drafts accepted (100%)]\n" in result.err
    assert "rounds" not in plain.err
    assert result.err.count("\n") == plain.err.count("\n") == 1


def test_an_untrained_branch_is_used_when_asked_for(run, models, branches):
    arguments = [*speculating(models, branches["untrained"]), "--prompt=hello"]
    plain, beta = run(*arguments, "--controller=plain"), run(*arguments)
    assert plain.out == beta.out
    assert "rounds" not in plain.err
    assert re.search(r"tokens/s; \d+ rounds, \d\.\d\d tokens per round, (\d+) of \1 drafts accepted \(100%\); first token", beta.err)


def test_lookup_drafts_without_a_branch_and_changes_no_answer(run, models):
    arguments = [f"--model={models['whole']}", "--arms=lookup", "--max_draft=2", "--max_new_tokens=24", "--prompt=the fox the fox the fox"]
    plain, drafted, default = (run(*arguments, f"--controller={name}") for name in ("plain", "fixed:2", "cost_aware"))
    assert plain.out == drafted.out == default.out
    assert re.search(r"; \d+ rounds, \d\.\d\d tokens per round, \d+ of [1-9]\d* drafts accepted \(\d+%\); first token", drafted.err)
    assert_refused(
        run(*arguments, "--controller=beta"), "--controller is 'beta', which needs the exit branch", "expected plain, fixed:K or cost_aware"
    )


def test_by_default_drafts_are_as_long_as_their_measured_cost_says(run, models, branches):
    arguments = [
        f"--model={models['whole']}",
        f"--exit_branch={branches['good']}",
        "--arms=exit,lookup",
        "--max_new_tokens=24",
        "--prompt=hello",
    ]
    result = run(*arguments)
    assert result.out == run(*arguments, "--controller=plain").out
    assert "tokens per round" in result.err


def test_a_model_without_a_branch_is_decoded_plainly_with_a_warning(run, models, branches):
    arguments = [f"--model={models['whole']}", "--max_new_tokens=24", "--prompt=hello"]
    result = run(*arguments, "--exit_branch=auto", terminals="err")
    assert result.code == 0
    assert "warning: no exit branch comes with model" in result.err
    assert result.err.replace("\r", "\n").count("warning") == 1
    assert "warning" not in run(*arguments, "--exit_branch=auto", "--controller=plain").err
    other = run(*speculating(models, branches["of_other_weights"]), "--prompt=hello")
    assert other.out == result.out
    assert other.err.startswith("warning: exit branch ")
    assert "made for another model (its target's weight fingerprint is " in other.err
    assert other.err.count("\n") == 2


@pytest.mark.parametrize(
    ("branch", "named"),
    [
        ("{of_another_size}", ["of_another_size", "hidden_size 64", "the model's is 32"]),
        ("{empty}", ["empty", "no exit_branch.safetensors", "expected an exit branch"]),
        ("./nosuch", ["exit branch './nosuch'", "no such folder", "expected auto, none, a folder"]),
        ("nosuch/branch", ["exit branch 'nosuch/branch'", "expected auto, none, a folder"]),
    ],
)
def test_bad_branches_are_refused_and_leave_nothing(run, models, branches, branch, named):
    name = branches[branch[1:-1]] if branch.startswith("{") else branch
    assert_refused(run(f"--model={models['whole']}", f"--exit_branch={name}", "--prompt=hi", "--output=out.jsonl"), *named)
    assert os.listdir() == []


@pytest.mark.parametrize("terminals", ["", "out"], ids=["piped", "terminal"])
@pytest.mark.parametrize("branch", ["good", "untrained"])
def test_compare_prints_one_answer_and_what_speculation_gained(run, models, branches, branch, terminals):
    arguments = [*speculating(models, branches[branch]), "--prompt=hello"]
    result = run(*arguments, "--compare", "--output=out.jsonl", terminals=terminals)
    answer = run(*arguments, "--controller=plain").out
    (line,) = read_output(pathlib.Path("out.jsonl").read_text())
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith(answer + "\n")
    lines = result.out.removeprefix(answer + "\n").splitlines()
    plain, eesd = (
        float(re.fullmatch(rf"{name}: +(\d+\.\d) tokens/s", text)[1]) for name, text in zip(("plain", "eesd"), lines, strict=False)
    )
    assert float(lines[2].removeprefix("ratio: ")) == pytest.approx(eesd / plain, abs=0.02)
    assert lines[3:5] == [f"tokens per round: {line['tokens_per_round']:.2f}", "identical: yes"]
    assert line["accepted"] > 0
    untrained = ["The exit branch is untrained: no speed-up is to be expected of it."] if branch == "untrained" else []
    assert lines[5:] == untrained


def test_compare_says_when_answers_differ(run, models, branches, monkeypatch):
    stream = Engine.stream

    def one_less(engine, prompt, *, controller, **options):
        end = yield from stream(engine, prompt, controller=controller, **options)
        return dataclasses.replace(end, token_ids=end.token_ids[:-1]) if controller else end

    monkeypatch.setattr(Engine, "stream", one_less)
    arguments = [*speculating(models, branches["good"]), "--prompt=hello", "--compare"]
    assert "\nidentical: no\n" in run(*arguments).out
    assert "\nidentical: no (sampled: " in run(*arguments, "--temperature=1").out


def test_compare_needs_a_prompt(run):
    assert_refused(run("--compare", "--exit_branch=auto"), "--compare is given without --prompt", "expected --prompt")


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


@pytest.mark.parametrize("arguments", [["--prompt=hello"], ["--prompts=prompts.jsonl"], []], ids=["prompt", "prompts", "chat"])
def test_ctrl_c_leaves_no_traceback_and_no_partial_output(run, models, monkeypatch, arguments):
    write_prompts([{"prompt": "a"}, {"prompt": "b"}])
    generate_ids, calls = Engine.generate_ids, []

    def interrupted_at_the_second(engine, *args, **kwargs):
        calls.append(args)
        if len(calls) == 2 or "--prompt=hello" in arguments:
            raise KeyboardInterrupt
        return generate_ids(engine, *args, **kwargs)

    monkeypatch.setattr(Engine, "generate_ids", interrupted_at_the_second)
    result = run(f"--model={models['whole']}", "--max_new_tokens=2", "--output=out.jsonl", *arguments, stdin="a\nb\n")
    assert result.code == 130
    assert "Traceback" not in result.err
    assert os.listdir() == ["prompts.jsonl"]


# In a process of its own -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    """As a user's, but offline, and with a cache of our own."""
    ours = {"EESD_JAX_CACHE": str(tmp_path_factory.mktemp("cache")), "HF_HUB_OFFLINE": "1"}
    return {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "TRANSFORMERS_NO_ADVISORY_WARNINGS")} | ours


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


@pytest.fixture
def heeds_sigint():
    """Processes started meanwhile heed it, although ours may be one that was started in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


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
    assert os.listdir(tmp_path) == []


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
