"""`benchmarks/replay.py`: what it plays are the decoder's own rounds."""

import json

import commands
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from eesd_jax import DecodeConfig, Engine
from eesd_jax.config import LONGEST_MATCH, DraftConfig
from eesd_jax.decode.controllers import Calibration
from eesd_jax.decode.sources import ngrams
from eesd_jax.engine.drafter import Drafter

PROMPTS = [[5, 9, 200, 31, 5, 9, 200], [7, 7], [250, 3]]
BUDGET, COST = 40, (1.0, 1.1, 1.2, 1.3)


@pytest.fixture(scope="module")
def benchmark_folder(tmp_path_factory):
    """Of a benchmark with nothing but plain decoding, and the prompts beside it."""
    folder = tmp_path_factory.mktemp("benchmark")
    records = [{"id": i, "category": "ab"[i % 2], "turns": ["again and again", "go on"][: i + 1]} for i in range(2)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    with commands.loaded("infer/benchmark.py") as command:
        result = commands.run(
            command, *flags(folder), f"--output_dir={folder}", "--controllers=plain", "--max_new_tokens=12", "--batch_size=2"
        )
        assert result.code == 0, result.err
    return folder


def flags(folder) -> tuple[str, ...]:
    return f"--prompts={folder / 'prompts.jsonl'}", "--model=tiny"


@pytest.fixture(scope="module")
def replay(benchmark_folder):
    with commands.loaded("benchmarks/replay.py") as module:
        yield module


@pytest.fixture(scope="module")
def lm() -> Engine:
    model, options = tiny.loaded_model()._replace(eos_ids=()), DecodeConfig(max_new_tokens=BUDGET, prompt_buckets=(16,), min_capacity=64)
    answer = Engine(model, options).generate_ids([PROMPTS[2]], seeds=[0], controller=None)[0].token_ids
    table = ngrams.build([answer, np.random.default_rng(0).integers(0, 300, 400).tolist()], 2**12)
    return Engine(model, options, Drafter(None, DraftConfig(0, 3, (2,), longest_match=LONGEST_MATCH), Calibration(), False, table))


def test_greedy_rounds_are_those_of_the_decoder(replay, lm):
    """Round by round, decoded one by one: as many drafted, and as many of them right."""
    for name in ("cost_aware", "fixed:2"):
        arms = replay.controllers(COST)[name]
        generations = [lm.generate_ids([prompt], seeds=[0], controller=arms)[0] for prompt in PROMPTS]
        texts = replay.texts_of([("all", prompt, text.token_ids) for prompt, text in zip(PROMPTS, generations, strict=True)], BUDGET, 3)
        played = replay.play(arms, texts._replace(categories=()), jnp.array(COST), jnp.asarray(lm.drafter.ngrams))
        logs = [generation.log for generation in generations]
        np.testing.assert_array_equal(played.rounds, [len(log.drafted) for log in logs])
        np.testing.assert_array_equal(played.drafted, [log.drafted.sum() for log in logs])
        np.testing.assert_array_equal(played.accepted, [log.accepted.sum() for log in logs])
        np.testing.assert_allclose(played.price, [np.array(COST)[log.drafted].sum() for log in logs], rtol=1e-5)
        assert sum(log.accepted.sum() for log in logs) > 0
        assert sum(log.drafted.sum() - log.accepted.sum() for log in logs) > 0


def test_nothing_beats_the_clairvoyant_and_categories_are_kept_apart(replay):
    rng = np.random.default_rng(1)
    rows = [("easy", [1, 2, 3], [1, 2, 3] * 12), ("hard", [1, 2, 3], rng.integers(0, 300, 36).tolist()), ("hard", [1], [5])]
    texts = replay.texts_of(rows, 40, 3)
    result = replay.compare(texts, COST, COST[0], None)
    assert set(result) == {"cost_aware", "fixed:1", "fixed:2", "fixed:3", replay.CLAIRVOYANT}
    for groups in result.values():
        assert set(groups) == {"all", "easy", "hard"}
        for group, found in groups.items():
            assert found["speedup"] <= result[replay.CLAIRVOYANT][group]["speedup"] + 1e-6
    assert result["cost_aware"]["easy"]["speedup"] > 2
    assert result["cost_aware"]["hard"]["speedup"] == pytest.approx(1, abs=0.05)
    assert result[replay.CLAIRVOYANT]["easy"]["acceptance"] == 1


def test_a_benchmark_is_replayed(replay, benchmark_folder, tmp_path):
    def run(*arguments: str, results=benchmark_folder) -> commands.Result:
        return commands.run(replay, *flags(benchmark_folder), f"--results={results}", *arguments)

    result = run("--cost=1,1.1,1.2", f"--json={tmp_path / 'replay.json'}")
    assert result.code == 0, result.err
    found = json.loads((tmp_path / "replay.json").read_text())
    assert found["cost"] == [1, 1.1, 1.2]
    assert set(found["controllers"]["cost_aware"]) == {"all", "a", "b"}
    assert "of clairvoyant" in result.out

    commands.assert_refused(run(), "does not know the price of looked-up drafts", "--cost")
    commands.assert_refused(run("--cost=1"), "--cost is '1'", "two positive numbers")
    commands.assert_refused(run("--cost=1,x"), "--cost is '1,x'")
    commands.assert_refused(run("--results="), "--results is missing")
    commands.assert_refused(run(results=tmp_path / "nowhere"), "cannot read", "runs.jsonl")
    other = tmp_path / "other.jsonl"
    other.write_text('{"prompt": "something else"}\n')
    commands.assert_refused(run(f"--prompts={other}", "--cost=1,2,3"), "is not what", "the same file")
