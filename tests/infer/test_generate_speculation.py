"""`infer/generate.py` with an exit branch or lookup: fewer rounds, the same answers; `--compare`; branches that do not fit."""

import dataclasses
import os
import pathlib
import re

import pytest
import tiny
from commands import assert_refused
from generate_command import FIELDS, PROMPTS, read_output, write_prompts

from eesd_jax.engine import engine
from eesd_jax.engine.engine import Engine
from eesd_jax.model.exit_branch import init_exit_branch
from eesd_jax.weights.branch_folder import describe, save_branch


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


OWN = """
import eesd_jax

class Most(eesd_jax.Controller):
    def keep_drafting(self, keys_B, plan, k, confidence_B):
        return confidence_B >= 0, plan
"""


def test_a_controller_of_ones_own_has_a_name(run, models, branches):
    pathlib.Path("own.py").write_text(OWN)
    arguments = [*speculating(models, branches["good"]), "--prompt=hello"]
    plain, own = run(*arguments, "--controller=plain"), run(*arguments, "--controller=own.py:Most")
    assert own.out == plain.out
    assert re.search(r" (\d+) of \1 drafts accepted \(100%\)", own.err)
    assert_refused(run(*arguments, "--controller=own.py:Least"), "--controller", "'own.py:Least'", "eesd_jax.Controller")
    assert_refused(run(*arguments, "--controller=none.py:Most"), "--controller", "cannot read 'none.py'")


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
        "--max_draft=2",
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


@pytest.mark.parametrize(("slower", "pairs"), [(1, 3), (100, 1)])
def test_compare_prints_medians_of_short_answers(run, models, branches, monkeypatch, slower, pairs):
    stream, seconds = Engine.stream, {True: [4.0, 2.0, 20.0], False: [1.0, 9.0, 0.5]}

    def timed(engine, prompt, *, controller, **options):
        end = yield from stream(engine, prompt, controller=controller, **options)
        return dataclasses.replace(end, seconds=slower * seconds[controller is None].pop(0))

    monkeypatch.setattr(Engine, "stream", timed)
    lines = run(*speculating(models, branches["good"]), "--prompt=hello", "--compare").out.splitlines()
    assert "ratio: 4.00" in lines
    assert [len(left) for left in seconds.values()] == [3 - pairs] * 2


def test_compare_needs_a_prompt(run):
    assert_refused(run("--compare", "--exit_branch=auto"), "--compare is given without --prompt", "expected --prompt")
