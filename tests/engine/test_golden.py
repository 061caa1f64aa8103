"""Plain decoding of the built-in model gives the tokens of transformers + PyTorch (`golden/make_greedy.py` wrote those down)."""

import json
import pathlib
import warnings

import pytest

import eesd_jax

RECORDS = json.loads((pathlib.Path(__file__).parent.parent / "golden" / "greedy.json").read_text(encoding="utf-8"))["records"]
TIE = 1e-3  # two implementations round differently: where the two best logits are closer than this, either may win


@pytest.fixture(scope="module")
def engine():
    model = eesd_jax.load("demo", dtype="float32").model
    return eesd_jax.Engine(model._replace(eos_ids=()))  # so that every token is compared, those behind an EOS too


@pytest.mark.demo
@pytest.mark.parametrize("record", RECORDS, ids=range(len(RECORDS)))
def test_greedy_tokens_equal_those_of_transformers(engine, record):
    expected = record["token_ids"]
    assert engine.encode(record["prompt"], chat=True) == record["prompt_ids"]
    tokens = engine.generate(record["prompt"], chat=True, max_new_tokens=len(expected)).token_ids
    assert len(tokens) == len(expected)
    if tokens != expected:
        step = next(i for i, (ours, theirs) in enumerate(zip(tokens, expected, strict=True)) if ours != theirs)
        gap = record["top2_gaps"][step]
        assert gap < TIE, f"token {step} is {tokens[step]}, not {expected[step]}, and the best two logits are {gap} apart"
        warnings.warn(f"{record['prompt']!r}: other text from token {step} on, where the best two logits are {gap} apart", stacklevel=1)


def test_there_are_twenty_prompts_of_64_tokens():
    assert [len(record["token_ids"]) for record in RECORDS] == [64] * 20
