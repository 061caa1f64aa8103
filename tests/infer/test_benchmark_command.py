"""`infer/benchmark.py` and what it runs: every file of the contract, goes on where it was killed, compares with plain decoding truthfully.

The command runs in this process on a tiny model, with one controller beside plain decoding, so that little is compiled.
"""

import dataclasses
import json
import os
import pathlib
import time

import commands
import compiled
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from absl import flags

from eesd_jax import cli
from eesd_jax.bench import record as journal
from eesd_jax.bench import run as benchmark
from eesd_jax.config import DecodeConfig, DraftConfig, SamplingConfig
from eesd_jax.decode.controllers import Calibration, Fixed
from eesd_jax.decode.costs import RoundCosts
from eesd_jax.engine import timing
from eesd_jax.engine.describe import describe_drafter
from eesd_jax.engine.drafter import Drafter
from eesd_jax.engine.engine import Engine
from eesd_jax.engine.generation import Generation, Rounds
from eesd_jax.engine.prompts import Conversation
from eesd_jax.model import llama
from eesd_jax.model.exit_branch import init_exit_branch

COSTS = journal.Costs(1.0, (1.1, 1.5, 2.0))
RECORDS = [
    {"id": "first", "category": "writing", "turns": ["hello fox", "there"]},
    {"id": "second", "category": "maths", "turns": ["12 345"]},
    {"id": "third", "category": "writing", "turns": ["the quick brown fox"]},
    {"id": "fourth", "category": "maths", "turns": ["lazy dog"]},
    {"id": "left out", "turns": ["never"]},
]
FILES = ["results.json", "runs.jsonl", "table.md"]
FILES += [f"{name}.png" for name in ("accepted_lengths", "acceptance_by_position", "draft_length_over_rounds", "speedup_by_category")]
RUNS = 5 * 2  # five turns, two controllers


@pytest.fixture(scope="module")
def command():
    with commands.loaded("infer/benchmark.py") as module:
        yield module


@pytest.fixture(scope="module")
def drafter() -> tuple:
    """A tiny model, and a branch that draws two drafts at most, which are now and then accepted; verified at one width."""
    model = tiny.loaded_model(num_hidden_layers=2)
    branch = init_exit_branch(model.config, model.params, 1, "zero")
    return model, Drafter(branch, DraftConfig(1, max_draft=2, verify_widths=()), Calibration(), trained=False)


@pytest.fixture(scope="module")
def engine(drafter) -> Engine:
    model, branch = drafter
    return Engine(model, DecodeConfig(max_new_tokens=12), branch)


@pytest.fixture
def run(command, drafter, monkeypatch, tmp_path):
    """Runs the command in this process, in a folder of its own, on the tiny model."""
    monkeypatch.chdir(tmp_path)
    pathlib.Path("prompts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    model, branch = drafter
    monkeypatch.setattr(cli, "load_from_flags", lambda: Engine(model, DecodeConfig(max_new_tokens=flags.FLAGS.max_new_tokens), branch))
    monkeypatch.setattr(benchmark, "measure_costs", lambda engine, batch: COSTS)

    def run(*arguments: str) -> commands.Result:
        given = dict(argument.split("=", 1) for argument in arguments)
        usual = {"--model": "tiny", "--exit_branch": "given", "--prompts": "prompts.jsonl", "--limit": "4", "--controllers": "fixed:2"}
        usual |= {"--max_new_tokens": "12", "--output_dir": "out"}
        return commands.run(command, *(f"{name}={value}" for name, value in (usual | given).items() if value))

    return run


@pytest.fixture
def calls(monkeypatch) -> list[tuple[list[list[int]], str]]:
    """What generation was asked for: prompts, and the controller's name."""
    seen, generate_ids = [], Engine.generate_ids

    def watched(engine, prompts, *, controller, **options):
        seen.append(([list(prompt) for prompt in prompts], "plain" if controller is None else "fixed:2"))
        return generate_ids(engine, prompts, controller=controller, **options)

    monkeypatch.setattr(Engine, "generate_ids", watched)
    return seen


def change_token(monkeypatch, prompt_token_ids: list[int], position: int) -> None:
    """Plants a mistake: speculation on that prompt gives another token at that place."""
    generate_ids = Engine.generate_ids

    def wrong(engine, prompts, *, controller, **options):
        generations = generate_ids(engine, prompts, controller=controller, **options)
        if controller is None or prompt_token_ids not in [list(prompt) for prompt in prompts]:
            return generations
        row = [list(prompt) for prompt in prompts].index(prompt_token_ids)
        token_ids = list(generations[row].token_ids)
        token_ids[position] = (token_ids[position] + 1) % tiny.VOCAB_SIZE
        generations[row] = dataclasses.replace(generations[row], token_ids=token_ids)
        return generations

    monkeypatch.setattr(Engine, "generate_ids", wrong)


def results() -> dict:
    return json.loads(pathlib.Path("out/results.json").read_text())


def rows() -> dict[tuple[str, str], dict]:
    return {(row["controller"], row["category"]): row for row in results()["rows"]}


def without_clock(row: dict) -> dict:
    return {name: value for name, value in row.items() if name not in ("seconds", "tokens_per_second", "speedup")}


def lines(path: str = "out/runs.jsonl") -> list[dict]:
    return [json.loads(line) for line in pathlib.Path(path).read_text().splitlines()]


# What is written ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("branch", "longest_match", "arms"), [(True, 0, "exit"), (False, 3, "lookup"), (True, 3, "exit+lookup")])
def test_what_drafted_is_named(drafter, branch, longest_match, arms):
    model, given = drafter
    draft = dataclasses.replace(given.draft, longest_match=longest_match)
    engine = Engine(model, DecodeConfig(), given._replace(branch=given.branch if branch else None, draft=draft))
    assert describe_drafter(engine)["arms"] == arms


def test_every_file_of_the_contract_is_written(run):
    result = run()
    assert result.code == 0, result.err
    assert sorted(os.listdir("out")) == sorted(FILES)
    found = results()
    assert {"machine", "model", "rows"} <= set(found)
    assert found["model"] == "tiny"
    assert {"device", "cpu", "cores", "jax", "dtype"} <= set(found["machine"])
    assert os.uname().nodename not in json.dumps(found["machine"])
    table = rows()
    assert list(table) == [(name, category) for category in ("writing", "maths", "all") for name in ("plain", "fixed:2")]
    for (name, category), row in table.items():
        assert (row["arms"], row["temperature"], row["batch_size"]) == ("none" if name == "plain" else "exit", 0.0, 1)
        assert row["identical_to_plain"] is True
        assert row["answers"] == {"writing": 3, "maths": 2, "all": 5}[category] == row["identical"]
        assert row["tokens"] == sum(len(answer["token_ids"]) for line in lines() for answer in answers(line, name, category))
        seconds = sum(line["run"]["seconds"] for line in lines() if answers(line, name, category))
        assert row["tokens_per_second"] == pytest.approx(row["tokens"] / seconds, abs=1e-3)
        assert row["speedup"] == pytest.approx(row["tokens_per_second"] / table["plain", category]["tokens_per_second"], rel=1e-2)
    assert table["fixed:2", "all"]["tokens_per_round"] > 1  # some drafts were accepted, or this tests nothing
    assert table["plain", "all"]["tokens_per_round"] == 1
    for name in FILES:
        content = pathlib.Path("out", name).read_bytes()
        assert content.startswith(b"\x89PNG") == name.endswith(".png")
        assert len(content) > 500
    assert result.out.strip() in pathlib.Path("out/table.md").read_text()
    assert [line.split()[1] for line in result.out.splitlines() if not line.startswith("|-")] == ["controller", "plain", "fixed:2"]
    assert "untrained" in result.err


def answers(line: dict, controller: str, category: str) -> list[dict]:
    run = line.get("run")
    return run["answers"] if run and run["controller"] == controller and category in (run["category"], "all") else []


def test_all_controllers_see_the_same_prompts_in_turns(run, calls):
    run()
    prompts = list(dict.fromkeys(json.dumps(prompts) for prompts, _ in calls))
    assert len(prompts) == 5
    for prompt in prompts:
        assert {name for prompts, name in calls if json.dumps(prompts) == prompt} == {"plain", "fixed:2"}
    first_of_each = [next(name for prompts, name in calls if json.dumps(prompts) == prompt) for prompt in prompts]
    assert first_of_each == ["plain", "fixed:2", "plain", "fixed:2", "plain"]
    plain_answer = next(answer for line in lines() for answer in answers(line, "plain", "all"))
    second_turn = json.loads(prompts[1])[0]
    assert plain_answer["text"] in tiny.tokenizer().decode(second_turn)


def test_a_batch_gives_what_each_prompt_gives_alone(run, engine):
    run()
    alone = rows()
    assert run("--batch_size=2", "--output_dir=batched").code == 0
    pathlib.Path("out").rename("alone")
    pathlib.Path("batched").rename("out")
    together = rows()
    assert {row["batch_size"] for row in together.values()} == {2}
    for key, row in together.items():
        for field in ("tokens", "rounds", "drafted", "accepted", "identical_to_plain", "accepted_lengths"):
            assert row[field] == alone[key][field]
    shapes = [(line["run"]["category"], [answer["id"] for answer in line["run"]["answers"]]) for line in lines() if "run" in line]
    assert shapes[::2] == [("writing", ["first", "third"]), ("writing", ["first"]), ("maths", ["second", "fourth"])]


def test_in_sampling_nothing_is_compared(run):
    assert run("--temperature=1").code == 0
    assert {row["identical_to_plain"] for row in rows().values()} == {None}
    assert {row["temperature"] for row in rows().values()} == {1.0}
    assert not any("divergences" in line for line in lines())


def test_plain_decoding_alone_can_be_measured(run):
    assert run("--controllers=plain").code == 0
    assert [key for key in rows() if key[1] == "all"] == [("plain", "all")]
    assert sorted(os.listdir("out")) == ["results.json", "runs.jsonl", "table.md"]


def test_a_conversation_that_outgrows_the_context_is_warned_of(run):
    half = "9" * (tiny.hf_config()["max_position_embeddings"] // 2)
    pathlib.Path("long.jsonl").write_text(json.dumps({"id": "long", "turns": ["a", half, half, "b"]}) + "\n")
    result = run("--prompts=long.jsonl", "--controllers=plain")
    assert result.code == 0
    assert result.err.count("prompt 'long' is left without answers from turn 3 on") == 1
    assert rows()["plain", "all"]["answers"] == 2


# Going on ----------------------------------------------------------------------------------------------------------------------------


class KilledError(Exception):
    """Stands for a kill."""


@pytest.mark.parametrize("finished", [0, 1, 4, 7])
def test_a_killed_benchmark_goes_on_where_it_stopped(run, calls, monkeypatch, finished):
    run()
    expected, done = {key: without_clock(row) for key, row in rows().items()}, lines()
    pathlib.Path("out").rename("whole")

    append, kinds = journal.Journal.append, []

    def killed(keeper, kind, value):
        kinds.append(kind)
        if kinds.count("run") > finished:
            raise KilledError
        append(keeper, kind, value)

    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(journal.Journal, "append", killed)
        run()
    assert os.listdir("out") == ["runs.jsonl"]
    with open("out/runs.jsonl", "a") as file:
        file.write('{"run": {"batch": 0, "tur')  # the line that was being written

    calls.clear()
    assert run().code == 0
    assert len(calls) == RUNS - finished
    assert {key: without_clock(row) for key, row in rows().items()} == expected
    assert [list(line) for line in lines()] == [list(line) for line in done]
    for again, once in zip(lines(), done, strict=True):
        assert again.get("run", {}).get("answers") == once.get("run", {}).get("answers")


def test_an_interrupted_benchmark_says_what_it_has(run, monkeypatch):
    append = journal.Journal.append

    def interrupted(keeper, kind, value):
        if len(keeper.entries("run")) == 3:
            raise KeyboardInterrupt
        append(keeper, kind, value)

    with monkeypatch.context() as patch:
        patch.setattr(journal.Journal, "append", interrupted)
        result = run()
    assert (result.code, result.out) == (130, "")
    assert result.err.splitlines()[-1] == f"[3 of {RUNS} runs are kept in 'out'; the same command goes on]"
    assert run().code == 0


def test_a_finished_benchmark_is_not_run_again(run, calls):
    run()
    before = {name: pathlib.Path("out", name).read_bytes() for name in FILES}
    calls.clear()
    assert run().code == 0
    assert calls == []
    assert {name: pathlib.Path("out", name).read_bytes() for name in FILES} == before


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ("--max_new_tokens=13", "max_new_tokens 12, and now max_new_tokens is 13"),
        ("--limit=2", "conversations 1, and now"),
        ("--temperature=0.5", "temperature 0.0, and now"),
        ("--controllers=fixed:1", "controllers ['plain', 'fixed:2'], and now controllers is ['plain', 'fixed:1']"),
        ("--seed=7", "seed 0, and now"),
        ("--stop=x", "stop [], and now"),
    ],
)
def test_other_settings_are_refused_by_name(run, calls, changed, words):
    run("--limit=1")
    before = {name: pathlib.Path("out", name).read_bytes() for name in os.listdir("out")}
    calls.clear()
    result = run("--limit=1", changed)
    assert (result.code, calls) == (2, [])
    assert f"error: --output_dir 'out' holds a benchmark with {words}" in result.err.splitlines()[-1]
    assert {name: pathlib.Path("out", name).read_bytes() for name in os.listdir("out")} == before


def test_another_prompt_file_is_refused(run):
    run("--limit=1")
    pathlib.Path("prompts.jsonl").write_text(json.dumps(RECORDS[0] | {"turns": ["another"]}) + "\n")
    result = run("--limit=1")
    assert result.code == 2
    assert "prompts_sha256" in result.err


@pytest.mark.parametrize("content", ['{"id": 1}\n', "no JSON\n", '{"settings": {}}\nno JSON\n', '{"settings": 1}\n', "[]\n", "no line"])
def test_a_file_of_somebody_else_is_left_alone(run, calls, content):
    pathlib.Path("out").mkdir()
    pathlib.Path("out/runs.jsonl").write_text(content)
    result = run()
    assert (result.code, calls) == (2, [])
    assert "was not written by this benchmark; expected another --output_dir" in " ".join(result.err.split())
    assert pathlib.Path("out/runs.jsonl").read_text() == content


def test_a_kill_within_the_first_line_is_no_hindrance(run):
    pathlib.Path("out").mkdir()
    pathlib.Path("out/runs.jsonl").write_text('{"settings": {"mod')
    assert run("--limit=1").code == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompts="], ["--prompts is missing", "a file of prompts"]),
        (["--output_dir="], ["--output_dir is missing", "a folder"]),
        (["--output_dir=prompts.jsonl"], ["--output_dir is 'prompts.jsonl'", "expected a folder"]),
        (["--limit=0"], ["--limit is 0", ">= 1"]),
        (["--controllers=plain,fast"], ["--controllers", "'fast'", "fixed:K"]),
        (["--controllers=fixed:9"], ["--controllers", "fixed:9", "8"]),
        (["--prompts=missing.jsonl"], ["missing.jsonl", "no such file"]),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(run, arguments, words):
    result = run(*arguments)
    assert (result.code, result.out, result.err.count("\n")) == (2, "", 1)
    assert all(word in result.err for word in words), result.err
    assert os.listdir() == ["prompts.jsonl"]


# Comparison with plain decoding ------------------------------------------------------------------------------------------------------


def test_a_planted_divergence_is_reported(run, engine, monkeypatch):
    prompt = engine.encode([{"role": "user", "content": "12 345"}])
    plain = engine.generate_ids([prompt], seeds=[0], controller=None)[0].token_ids
    change_token(monkeypatch, prompt, position=3)
    assert run().code == 0
    table = rows()
    counts = {key: (row["identical_to_plain"], row["identical"], row["excused"], row["different"]) for key, row in table.items()}
    assert counts["fixed:2", "maths"] == (False, 1, 0, 1)
    assert counts["fixed:2", "writing"] == (True, 3, 0, 0)
    assert counts["fixed:2", "all"] == (False, 4, 0, 1)
    assert counts["plain", "all"] == (True, 5, 0, 0)
    (found,) = results()["divergences"]
    assert (found["controller"], found["id"], found["turn"], found["position"], found["excused"]) == ("fixed:2", "second", 0, 3, False)
    # The gap, from one pass over everything before it.
    model = engine.model
    tokens = jnp.array([prompt + plain[:3]])
    x, _ = llama.forward_blocks(
        model.config, model.params["blocks"], llama.embed(model.params, tokens), jnp.zeros(1, jnp.int32), None, range(2)
    )
    logits = np.sort(np.asarray(llama.logits(model.config, model.params, x)[0, -1]))
    assert found["gap"] == pytest.approx(logits[-1] - logits[-2], abs=1e-4)
    assert "| fixed:2" in pathlib.Path("out/table.md").read_text().split("differ")[-1]


def test_only_a_near_tie_of_both_tokens_is_excused(engine, monkeypatch):
    def found(logits: list[float], ours: int, dtype=jnp.float32) -> journal.Divergence:
        monkeypatch.setattr(benchmark, "next_logits", lambda engine, tokens: np.array(logits, np.float32))
        params = engine.model.params | {"final_norm": engine.model.params["final_norm"].astype(dtype)}
        runs = {
            name: journal.Run(0, 0, name, "all", 1.0, [journal.Answer("a", tokens, "", "length", Rounds.plain(len(tokens)))])
            for name, tokens in (("plain", [5, 0, 2]), ("beta", [5, ours, 2]))
        }
        (divergence,) = benchmark.find_divergences(Engine(engine.model._replace(params=params)), [[1, 2]], runs)
        assert divergence.position == 1
        return divergence

    tie, clear = [2.0, 1.9995, -1.0], [2.0, 1.9, -1.0]
    assert found(tie, ours=1).excused
    assert found(tie, ours=1).gap == pytest.approx(0.0005, abs=1e-6)
    assert not found(tie, ours=2).excused  # the gap is small, but this token has no part in it
    assert not found(clear, ours=1).excused
    assert not found(tie, ours=1, dtype=jnp.bfloat16).excused


def test_an_answer_that_ends_early_diverges_where_it_ends(engine):
    runs = {
        name: journal.Run(0, 0, name, "all", 1.0, [journal.Answer("a", tokens, "", "length", Rounds.plain(len(tokens)))])
        for name, tokens in (("plain", [5, 6, 7]), ("beta", [5, 6]))
    }
    (found,) = benchmark.find_divergences(engine, [[1, 2]], runs)
    assert (found.position, found.excused) == (2, False)


# Time --------------------------------------------------------------------------------------------------------------------------------


def test_a_run_that_compiled_something_is_repeated():
    class Compiling:
        """An engine that compiles in its first two runs."""

        runs = 0

        def generate_ids(self, prompts, **options):
            self.runs += 1
            if self.runs < 3:
                jax.jit(lambda x: x + self.runs)(jnp.zeros(self.runs)).block_until_ready()
            return [Generation("", [1], 1, "length", Rounds.plain(1), seconds=float(self.runs), first_token_seconds=0.0)]

    engine, options = Compiling(), benchmark.Options(SamplingConfig(), 1, 0, (), True)
    batch = benchmark.Batch("all", {0: Conversation("a", None, (), ("hi",), 1)})
    with benchmark.watch_compilation() as compilations:
        _, seconds = benchmark._timed(engine, {0: [1]}, batch, None, options, compilations)
    assert (engine.runs, seconds) == (3, 3.0)


def test_a_warm_program_is_not_compiled_again(engine):
    arguments = {"seeds": [0], "controller": Fixed(2), "batch_size": 1}
    engine.generate_ids([[5, 6, 7]], **arguments)
    with benchmark.watch_compilation() as compilations:
        engine.generate_ids([[5, 8]], **arguments | {"seeds": [1]})
    assert compilations == []


def test_a_whole_benchmark_compiles_each_program_once(run):
    with compiled.programs() as counts:
        assert run("--controllers=fixed:2,threshold:0.5,beta").code == 0
    assert len([line for line in lines() if "run" in line]) == 5 * 4
    assert counts["_decode_plain"] == 1
    assert counts["_decode_speculative"] == 3
    assert counts["prefill"] == 2  # with the branch's cache, and without


class SlowEngine(Engine):
    """A round that drafts nothing takes 3 ms, a plain step 2 ms."""

    def prefill(self, prompts, seeds, batch, budget, controller=None):
        return np.zeros(batch)

    def decode(self, state, sampling, controller, max_steps):
        time.sleep(max_steps * (0.002 if controller is None else 0.003))
        return state


def test_the_plain_step_is_priced_relative_to_a_round(engine, monkeypatch):
    monkeypatch.setattr(timing, "round_costs", lambda engine, batch: RoundCosts((6.0, 7.0, 8.0), (6.0, 6.5, 7.0)))
    costs = benchmark.measure_costs(SlowEngine(engine.model, engine.decode_config, engine.drafter), 1)
    assert (costs.rounds, costs.look_up) == ((6.0, 7.0, 8.0), (6.0, 6.5, 7.0))
    assert costs.plain == pytest.approx(4.0, rel=0.3)


def test_with_eos_ignored_every_answer_takes_its_budget(run, drafter, monkeypatch):
    def answers(folder: str, *arguments: str) -> list[dict]:
        result = run("--limit=1", f"--output_dir={folder}", *arguments)
        assert result.code == 0, result.err
        found = [json.loads(line) for line in pathlib.Path(folder, "runs.jsonl").read_text().splitlines()]
        return [answer for line in found if "run" in line for answer in line["run"]["answers"]]

    model, branch = drafter
    common = answers("first")[0]["token_ids"][3]  # from now on it ends a text
    ending = Engine(model._replace(eos_ids=(common,)), DecodeConfig(max_new_tokens=12), branch)
    monkeypatch.setattr(cli, "load_from_flags", lambda: ending)
    assert "eos" in {answer["finish_reason"] for answer in answers("ended")}
    everything = answers("whole", "--ignore_eos=true")
    assert {(len(answer["token_ids"]), answer["finish_reason"]) for answer in everything} == {(12, "length")}
    assert "12 new tokens, EOS ignored" in pathlib.Path("whole/table.md").read_text()


def test_batches_are_of_one_category_and_in_order():
    names = ["b", "a", "b", None, "a", "b"]
    conversations = [Conversation(i, name, (), ("hi",), i) for i, name in enumerate(names)]
    batches = benchmark.make_batches(conversations, 2)
    assert [(batch.category, list(batch.conversations)) for batch in batches] == [
        ("b", [0, 2]),
        ("b", [5]),
        ("a", [1, 4]),
        ("uncategorized", [3]),
    ]
