"""Command lines with mistakes in them, by the hundred: one line and exit code 2, or an answer; never a traceback, and nothing half-written.

A seeded generator changes command lines that are right. Models are loaded and files read for real; what takes long behind that (generating,
training, compiling for chips) is stood in for.
"""

import json
import os
import pathlib
import random
import shutil
import warnings

import commands
import pytest
from absl import flags

from eesd_jax.engine import engine, timing
from eesd_jax.engine.generation import Generation, Rounds
from eesd_jax.errors import UserError

STOOD_IN = "stood in for"
CONFIG = str(commands.ROOT / "configs" / "tiny.py")
RIGHT = {
    "infer/generate.py": [
        ["--model=tiny", "--prompt=hi", "--max_new_tokens=4", "--output=out.jsonl"],
        ["--model=tiny", "--prompts=good.jsonl", "--batch_size=2", "--controller=plain", "--seed=3", "--output=out.jsonl"],
        ["--model=tiny", "--prompts=good.jsonl", "--exit_branch=none", "--arms=lookup", "--temperature=0.7", "--top_p=0.9", "--stop=x"],
        ["--model=tiny", "--prompt=hi", "--mesh=tensor:2", "--quantize=int8", "--dtype=float32", "--nochat", "--stream", "--candidates=1"],
        ["--model=tiny", "--compare", "--prompt=hi", "--max_draft=3", "--ngrams=none"],
        ["--model=tiny", "--output=out.jsonl"],
    ],
    "infer/benchmark.py": [
        ["--model=tiny", "--prompts=good.jsonl", "--controllers=plain,fixed:2", "--limit=1", "--output_dir=results"],
        ["--model=tiny", "--prompts=good.jsonl", "--controller=cost_aware", "--output_dir=results", "--ignore_eos", "--batch_size=2"],
    ],
    "train/self_generate.py": [[f"--config={CONFIG}", "--config.output_dir=run", "--config.self_generate.num_responses=4"]],
    "train/distill.py": [
        [f"--config={CONFIG}", "--config.output_dir=run", "--config.branch.exit_layer=2", "--config.steps=3"],
        [f"--config={CONFIG}", "--show_examples=2", "--config.data.path=chats.jsonl"],
    ],
    "train/ngrams.py": [[f"--config={CONFIG}", "--config.output_dir=run", "--config.data.path=chats.jsonl", "--entries_log2=8"]],
    "train/plan.py": [
        [f"--config={CONFIG}", "--topology=h100:8", "--nocompile", "--what=all", "--batch_size=2"],
        [f"--config={CONFIG}", "--recommend=v5e", "--nocompile", "--tokens=1e6", "--controller=fixed:2"],
    ],
}
AWKWARD = [
    *(
        "",
        " ",
        "-1",
        "0",
        "1",
        "2",
        "999999999999999999999",
        "-0",
        "1e999",
        "nan",
        "inf",
        "-inf",
        "0.5",
        "1_0",
        "0x10",
        "\uff11\uff12",
        "true",
        "none",
    ),
    *(
        "None",
        "[]",
        "{}",
        "()",
        ",",
        ",,",
        ":",
        "a:b",
        "a:b:c",
        "=",
        "==",
        "-",
        "--",
        "\n",
        "\t",
        "a\nb",
        "\udcff",
        "\ud83d",
        "日本",
        "😀",
        "%s",
    ),
    *(
        "~",
        "~nosuchuser/x",
        "/",
        ".",
        "..",
        "/dev/null",
        "/dev/full",
        "folder",
        "folder/x",
        "nosuch/x",
        "good.jsonl",
        "good.jsonl/x",
        "x" * 300,
    ),
    *(
        "empty.jsonl",
        "bad.jsonl",
        "binary",
        "half.gguf",
        "chats.jsonl",
        "gs://nosuch/x",
        "s3://x",
        "nosuch://x",
        "file://x",
        "a//b",
        "a/b/c/d",
    ),
    *(
        "plain",
        "fixed:0",
        "fixed:99",
        "fixed:x",
        "fixed:",
        "threshold:0.5",
        "threshold:nan",
        "beta",
        "beta:x",
        "auto",
        "calibrated",
        "plain,plain",
    ),
    *(
        "tensor:2",
        "tensor:0",
        "data:2,tensor:4",
        "tensor:2,tensor:2",
        "fsdp:999",
        "exit",
        "lookup",
        "exit,lookup",
        "float16",
        "int4",
        "demo2",
    ),
    *("v5p:2x2x4", "v5p:0x0x0", "h100:0", "h100:999999999", "v9:1", "8", "1024", "3", "-5"),
]


def files() -> None:
    """What command lines name, whole and damaged."""
    good = [{"prompt": "hello"}, {"turns": ["a", "b"], "category": "x"}, {"messages": [{"role": "user", "content": "c"}]}]
    pathlib.Path("good.jsonl").write_text("".join(json.dumps(record) + "\n" for record in good))
    chats = [{"messages": [{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": "yes"}]} for i in range(9)]
    pathlib.Path("chats.jsonl").write_text("".join(json.dumps(record) + "\n" for record in chats))
    pathlib.Path("bad.jsonl").write_text('{"prompt": "a", "id": "\\ud83d"}\n{"prompt"')
    pathlib.Path("empty.jsonl").write_text("")
    pathlib.Path("binary").write_bytes(bytes(range(256)))
    pathlib.Path("half.gguf").write_bytes(b"GGUF\3\0\0\0" + bytes(range(64)))
    pathlib.Path("folder").mkdir()


def mutate(rng: random.Random, arguments: list[str], names: list[str]) -> list[str]:
    """A command line with one to three mistakes, or with none."""
    changed = list(arguments)
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = rng.randrange(len(changed)) if changed else 0
        kind = rng.randrange(8) if changed else 4
        if kind == 0:
            changed[at] = changed[at].partition("=")[0] + "=" + rng.choice(AWKWARD)
        elif kind == 1:
            changed.insert(at, changed[at].partition("=")[0] + "=" + rng.choice(AWKWARD))
        elif kind == 2:
            del changed[at]
        elif kind == 3:
            place = rng.randrange(len(changed[at]) + 1)
            changed[at] = changed[at][:place] + rng.choice((*"-=:,.0 \n", "", "é", "\udcff")) + changed[at][place + rng.randrange(3) :]
        elif kind == 4:
            changed.insert(at, f"--{rng.choice(names)}={rng.choice(AWKWARD)}")
        elif kind == 5:
            changed[at] = rng.choice((changed[at].partition("=")[0], changed[at].lstrip("-"), changed[at].replace("--", "--no", 1)))
        elif kind == 6:
            changed.insert(at, rng.choice(AWKWARD))
        else:
            changed[at] = changed[at].replace("=", rng.choice(("", "==", " ", "=-")), 1)
    # argv holds no NUL, and help is for another test.
    return [argument.replace("\0", "") for argument in changed if argument not in ("-h", "--h") and "help" not in argument]


@pytest.fixture
def stand_ins(monkeypatch):
    """What takes long is over at once."""
    monkeypatch.setattr(engine.Engine, "generate_ids", generate_ids)
    monkeypatch.setattr(engine.Engine, "stream", stream)
    monkeypatch.setattr(timing, "measure", lambda lm, batch: timing.RoundCosts(*(costs(lm, kind) for kind in range(2))))

    def over(*arguments, **options):
        raise UserError(STOOD_IN)

    for name in (
        *("eesd_jax.bench.run.measure_costs", "eesd_jax.bench.run.run_all", "eesd_jax.distill.trainer.train"),
        *("eesd_jax.distill.self_generate.self_generate", "eesd_jax.planning.recommend.plan_for"),
    ):
        monkeypatch.setattr(name, over)


def costs(lm: engine.Engine, kind: int) -> tuple[float, ...]:
    draft = lm.drafter.draft
    return (1.0,) * (draft.max_draft + 1) if kind == 0 or draft.longest_match else ()


def generate_ids(lm, prompts, *, seeds, **options):
    return [Generation("text", [5], len(prompt), "length", Rounds.plain(1), 0.1, 0.1) for prompt in prompts]


def stream(lm, prompt, **options):
    lm.encode(prompt, chat=options["chat"])
    yield "text"
    return generate_ids(lm, [[1]], seeds=[0])[0]


def check(result: commands.Result, arguments: list[str], before: list[str]) -> None:
    shown = f"{arguments!r}: {result}"
    assert result.code in (0, 1, 2), shown
    assert "Traceback" not in result.err, shown
    errors = [line for line in result.err.splitlines() if line.startswith("error: ")]
    if result.code == 1:  # train/plan.py: it does not fit
        assert "is too small" in result.err or "is large enough" in result.err, shown
    elif result.code == 2:
        assert len(errors) == 1 and result.err.splitlines()[-1] == errors[0], shown
        assert len(errors[0]) < 2000, shown
        left = set(os.listdir()) - set(before)
        assert not left or STOOD_IN in result.err, f"{left} left behind: {shown}"
    else:
        assert not errors, shown
    assert not [name for name in os.listdir() if name.startswith(".") or name.endswith(".partial")], shown


def try_commands(tmp_path: pathlib.Path, monkeypatch, script: str, seeds: range) -> int:
    """Runs the command lines of those seeds; returns how many were refused."""
    monkeypatch.setenv("EESD_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    refused = 0
    with commands.loaded(script) as module, warnings.catch_warnings():
        names = [flag.name for flag in flags.FLAGS.flags_by_module_id_dict()[id(module)]]
        # Several processes wait for each other, and a mistake in that is another test's.
        names = [name for name in names if name not in ("coordinator_address", "num_processes", "process_id")]
        for seed in seeds:
            rng = random.Random(f"{script} {seed}")
            place = tmp_path / str(seed)
            place.mkdir()
            with monkeypatch.context() as patch:
                patch.chdir(place)
                files()
                arguments = mutate(rng, rng.choice(RIGHT[script]), names)
                before = os.listdir()
                result = commands.run(module, *arguments, stdin="hello\n/exit\n")
                check(result, arguments, before)
                refused += result.code == 2
            shutil.rmtree(place)
    return refused


@pytest.mark.parametrize("script", RIGHT)
def test_some_mutated_command_lines(tmp_path, monkeypatch, stand_ins, script):
    assert try_commands(tmp_path, monkeypatch, script, range(15)) > 5


@pytest.mark.slow
@pytest.mark.parametrize(("script", "first"), [(script, first) for script in RIGHT for first in range(0, 100, 50)])
def test_six_hundred_mutated_command_lines(tmp_path, monkeypatch, stand_ins, script, first):
    assert try_commands(tmp_path, monkeypatch, script, range(100 + first, 150 + first)) > 15
