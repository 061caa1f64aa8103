"""`infer/generate.py`: mistakes in flags, prompts and models are one line and exit code 2, with nothing left behind.

Those in exit branches are in `test_generate_speculation.py`.
"""

import os
import pathlib

import pytest
from commands import assert_refused
from generate_command import CONTEXT, write_prompts

from eesd_jax.engine import engine
from eesd_jax.engine.engine import Engine

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
        (["--quantize=int3"], ["--quantize is 'int3'", "expected one of none, int8, int4"]),
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
