"""`benchmarks/greedy_identity.py`: a sample of its grid on the built-in model, and that it counts what it finds truthfully."""

import pathlib

import commands
import pytest
import tiny
from absl import flags

import eesd_jax
from eesd_jax import DecodeConfig, Engine, UserError
from eesd_jax.bench.record import Journal
from eesd_jax.model.exit_branch import init_exit_branch

QUESTIONS = ("Why is the sky blue?", "Write a haiku about the sea.", "def fibonacci(n):")


@pytest.fixture(scope="module")
def identity():
    with commands.loaded("benchmarks/greedy_identity.py") as module:
        yield module


def open_journal(folder: pathlib.Path, texts: int) -> Journal:
    return Journal(folder / "identity.jsonl", {"code": "0123abcd", "texts": {"all prompts": texts, "grid": texts}})


@pytest.mark.demo
@pytest.mark.slow
def test_texts_of_the_built_in_model_are_those_of_plain_decoding(identity, tmp_path):
    model = eesd_jax.load("demo", dtype="float32").model._replace(eos_ids=())
    engine = Engine(model, DecodeConfig(max_new_tokens=48))
    prompts = identity.Prompts(list(QUESTIONS), [engine.encode(question) for question in QUESTIONS])
    branches = {kind: identity.make_branch(model.config, model.params, kind) for kind in identity.BRANCHES}
    journal = open_journal(tmp_path, len(QUESTIONS))
    identity.run_cell(engine, branches, identity.Cell("grid", "beta", 4, 4), prompts, journal)
    tallies = identity.tallies(journal)
    assert len(tallies) == len(branches)
    for tally in tallies.values():
        assert (tally["texts"], tally["tokens"], tally["different"]) == (3, 3 * 48, 0)
        assert tally["drafted"] > 0


@pytest.fixture
def engine() -> Engine:
    return Engine(tiny.loaded_model()._replace(eos_ids=()), DecodeConfig(max_new_tokens=6, prompt_buckets=(16,), min_capacity=32))


@pytest.fixture
def prompts(identity):
    return identity.Prompts(["a", "b", "c"], [[7], [5, 9], [11, 12, 13]])


def decoded_wrongly(identity, wrong: str, calls: list):
    """A `decode` that decodes plainly, and changes the fourth token of one prompt's answers, except those of plain decoding itself."""
    decode = identity.decode

    def patched(engine, branch, cell, prompts):
        calls.append((cell.controller, tuple(prompts.ids)))
        generations = decode(engine, branch, cell._replace(controller="plain"), prompts)
        for i, generation in zip(prompts.ids, generations, strict=True):
            if i == wrong and cell.controller != "plain":
                generation.token_ids[3] += 1
        return generations

    return patched


def test_a_planted_difference_is_counted_and_listed(identity, engine, prompts, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(identity, "EXIT_LAYER", 1)
    monkeypatch.setattr(identity, "decode", decoded_wrongly(identity, "b", calls))
    branch = init_exit_branch(engine.model.config, engine.model.params, 1, "zero")
    cell = identity.Cell("grid", "beta", 8, 2)
    identity.run_cell(engine, {"zero": branch}, cell, prompts, open_journal(tmp_path, 3))
    journal = open_journal(tmp_path, 3)  # as another process would read it
    tally = identity.tallies(journal)[cell, "zero"]
    assert (tally["texts"], tally["tokens"], tally["excused"], tally["different"]) == (3, 18, 0, 1)
    assert [(found["id"], found["position"]) for found in tally["found"]] == [("b", 3)]
    summary = identity.to_markdown(journal)
    assert "3 texts, 18 tokens: 2 texts identical, 0 excused, 1 different" in summary
    assert "Not complete" in summary
    assert "| zero | b | 3 |" in " ".join(summary.split())
    # Going on does nothing again.
    assert calls == [("plain", ("a", "b")), ("beta", ("a", "b")), ("plain", ("c",)), ("beta", ("c",))]
    identity.run_cell(engine, {"zero": branch}, cell, prompts, journal)
    assert len(calls) == 4


def test_every_cell_of_the_grid_is_there_once(identity):
    cells = identity.all_cells()
    assert len(set(cells)) == len(cells) == 1 + 6 * 4 * 2
    assert {cell.max_draft for cell in cells} == {1, 4, 8, 16}


def test_the_sample_is_of_all_lengths_and_fits(identity):
    prompts = identity.Prompts([str(n) for n in range(1, 101)], [[0] * n for n in range(1, 101)])
    chosen = prompts.sample(20, longest=60)
    assert len(set(chosen.ids)) == 20
    assert [len(tokens) for tokens in chosen.tokens][::19] == [1, 60]


@pytest.mark.parametrize(("argument", "missing"), [("--prompts=a.jsonl", "output_dir"), ("--output_dir=out", "prompts")])
def test_missing_flags_are_named(identity, argument, missing):
    flags.FLAGS.unparse_flags()
    for name in ("prompts", "output_dir"):
        flags.FLAGS[name].unparse()
    flags.FLAGS(["benchmark", argument])
    with pytest.raises(UserError, match=f"--{missing} is missing"):
        identity.main([])
