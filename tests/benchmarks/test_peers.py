"""`benchmarks/peers.py`: it compares truthfully, goes on without packages that are missing, and on a tiny model its peers agree."""

import json
import sys

import commands
import dequantized
import gguf
import numpy as np
import pytest
import tiny

from eesd_jax import DecodeConfig, Engine
from eesd_jax.weights.gguf import GGUFSource

PROMPTS = [[5, 9, 200, 31], [7]]


@pytest.fixture(scope="module")
def peers():
    with commands.loaded("benchmarks/peers.py") as module:
        yield module


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(tiny.loaded_model()._replace(eos_ids=()), DecodeConfig(max_new_tokens=6, prompt_buckets=(16,), min_capacity=32))


@pytest.fixture(scope="module")
def texts(engine) -> list[list[int]]:
    return [text.token_ids for text in engine.generate_ids(PROMPTS, seeds=[0, 0], controller=None)]


def way(peers, peer: str, kind: str, texts: list[list[int]]):
    """A peer that knows its texts by heart."""
    return peers.Way(peer, kind, "none", lambda ids, budget: texts[PROMPTS.index(ids)][:budget])


def test_speeds_and_texts_are_compared_with_the_same_peer_and_with_the_reference(peers, engine, texts):
    wrong = [[*texts[0][:3], (texts[0][3] + 1) % tiny.VOCAB_SIZE, *texts[0][4:]], texts[1]]
    ways = [way(peers, "transformers", peers.PLAIN, texts), way(peers, "other", peers.PLAIN, wrong), way(peers, "other", "fast", texts)]
    seconds = (4.0, 2.0, 1.0)
    timings = [{one: peers.Timing(one.answer(ids, 6), spent) for one, spent in zip(ways, seconds, strict=True)} for ids in PROMPTS]
    reference, other, fast = peers.result_rows(engine, PROMPTS, ways, timings)
    assert [row["tokens_per_second"] for row in (reference, other, fast)] == pytest.approx([12 / 8, 12 / 4, 12 / 2])
    assert [row["ratio_to_transformers"] for row in (reference, other, fast)] == pytest.approx([1, 2, 4])
    assert [row["ratio_to_own_plain"] for row in (reference, other, fast)] == pytest.approx([1, 1, 2])
    assert reference["like_transformers"]["identical"] == fast["like_transformers"]["identical"] == 2
    for row in (other["like_transformers"], fast["like_own_plain"]):
        assert (row["identical"], row["excused"], row["different"]) == (1, 0, 1)
        assert [(found["prompt"], found["position"]) for found in row["found"]] == [(0, 3)]


def test_without_the_reference_nothing_is_compared_with_it(peers, engine, texts):
    ways = [way(peers, "other", peers.PLAIN, texts)]
    (row,) = peers.result_rows(engine, PROMPTS, ways, [{ways[0]: peers.Timing(text, 1.0)} for text in texts])
    assert row["ratio_to_transformers"] is row["like_transformers"] is None
    assert row["like_own_plain"]["identical"] == 2


def test_peers_take_turns_and_what_fails_is_left_out(peers, texts):
    asked = []

    def noted(name: str, answer):
        def ask(ids, budget):
            asked.append((name, PROMPTS.index(ids)))
            return answer(ids, budget)

        return peers.Way(name, peers.PLAIN, "none", ask)

    def fails(ids, budget):
        raise NotImplementedError("no such thing\nfurther lines")

    ways = [noted(name, lambda ids, budget: [1]) for name in "ab"] + [noted("c", fails)]
    working, timings, failed = peers.measure(ways, PROMPTS, 4, lambda: None)
    assert working == ways[:2]
    assert failed == {"c, plain": "NotImplementedError: no such thing"}
    assert asked == [("a", 0), ("b", 0), ("c", 0), ("a", 0), ("b", 0), ("b", 1), ("a", 1)]
    assert all(list(timing) for timing in timings)


@pytest.fixture
def small(tmp_path, monkeypatch) -> list[str]:
    """Flags of a run that takes seconds: lookup with one draft, of a controller that needs no measured costs."""
    (tmp_path / "prompts.jsonl").write_text('{"turns": ["the quick the quick the", "not this"]}\n{"prompt": "b"}\n{"prompt": "c"}\n')
    file = tiny.write_gguf(tmp_path / "tiny.gguf", tiny.hf_config())
    return [f"--model={file}", f"--prompts={tmp_path / 'prompts.jsonl'}", "--limit=2", "--max_new_tokens=8", "--early_exit=1"]


def no_package(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """As if these were not installed."""
    for name in names:
        monkeypatch.setitem(sys.modules, name, None)


def run_eesd_jax_plainly(peers, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out EESD, which compiles for long and is tested elsewhere."""
    ways = peers.eesd_jax_ways
    monkeypatch.setattr(peers, "eesd_jax_ways", lambda peer, work: [next(iter(ways(peer, work)))])


def test_peers_whose_packages_are_missing_are_left_out_with_a_line(peers, small, monkeypatch, tmp_path):
    no_package(monkeypatch, "torch", "llama_cpp", "torch_reference", "llama_cpp_reference")
    run_eesd_jax_plainly(peers, monkeypatch)
    result = commands.run(peers, *small, f"--json={tmp_path / 'out.json'}")
    assert result.code == 0, result.err
    found = json.loads((tmp_path / "out.json").read_text())
    assert [row["peer"] for row in found["rows"]] == ["eesd_jax", "eesd_jax-float32"]
    assert [len(row["tokens"]) for row in found["rows"]] == [2, 2]
    assert set(found["left_out"]) == {"transformers", "llama.cpp", "llama.cpp-bf16", "llama.cpp-stored"}
    assert "warning: transformers is left out: package" in result.err
    assert "eesd_jax-float32, plain" in result.out
    assert str(tmp_path) not in (tmp_path / "out.json").read_text()


def test_it_ends_with_a_line_where_nobody_is_left(peers, small, monkeypatch):
    no_package(monkeypatch, "torch", "torch_reference")
    result = commands.run(peers, *small, "--peers=transformers")
    assert (result.code, result.out) == (2, "")
    assert "none of --peers=transformers can answer" in result.err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--peers=transformers,vllm"], ["--peers names 'vllm'", "llama.cpp-stored"]),
        (["--peers="], ["--peers is empty", "llama.cpp-stored"]),
        (["--limit=0"], ["--limit is 0", "integer >= 1"]),
        (["--max_new_tokens=0"], ["--max_new_tokens is 0", "integer >= 1"]),
        (["--lookup_tokens=0"], ["--lookup_tokens is 0", "integer >= 1"]),
        (["--model=tiny", "--peers=eesd_jax,llama.cpp"], ["--model is 'tiny'", "--peers names llama.cpp", ".gguf"]),
        (["--model=tiny", "--peers=eesd_jax", "--early_exit=4"], ["--early_exit is 4", "4 blocks"]),
    ],
)
def test_mistakes(peers, arguments, named):
    commands.assert_refused(commands.run(peers, *arguments), *named)


@pytest.mark.parity
def test_transformers_writes_the_same_texts_with_its_own_speculation_and_without(peers, small, monkeypatch, tmp_path):
    pytest.importorskip("torch")
    run_eesd_jax_plainly(peers, monkeypatch)
    result = commands.run(peers, *small, "--peers=transformers,eesd_jax", f"--json={tmp_path / 'out.json'}")
    assert result.code == 0, result.err
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["kind"] for row in rows] == ["plain", "prompt lookup", "early exit", "plain"]
    assert all(row["like_transformers"]["identical"] == 2 for row in rows)


@pytest.mark.parity
def test_llama_cpp_writes_the_texts_of_this_project(peers, small, monkeypatch, tmp_path):
    pytest.importorskip("llama_cpp")
    run_eesd_jax_plainly(peers, monkeypatch)
    # llama.cpp expects as many rows of the embedding as the tokenizer has tokens.
    tiny.write_gguf(tmp_path / "tiny.gguf", tiny.hf_config(vocab_size=len(tiny.tokenizer())))
    result = commands.run(peers, *small, "--peers=llama.cpp,eesd_jax", f"--json={tmp_path / 'out.json'}")
    assert result.code == 0, result.err
    plain, lookup, ours = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert lookup["like_own_plain"]["identical"] == 2
    assert plain["tokens"] == ours["tokens"]


@pytest.mark.parametrize("kind", [gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.BF16])
def test_a_dequantized_file_is_the_same_model(tmp_path, kind):
    hf = tiny.hf_config(tie_word_embeddings=True)
    stored = tiny.write_gguf(tmp_path / "stored.gguf", hf, matrix_type=gguf.GGMLQuantizationType.Q4_1)
    dequantized.write(stored, tmp_path / "written.gguf", kind)
    expected, found = GGUFSource(stored), GGUFSource(tmp_path / "written.gguf")
    assert found.hf_config() == expected.hf_config()
    assert found.shapes == expected.shapes
    for field in ("tokens", "merges", "token_type", "pre", "bos_token_id"):
        assert found.field(f"tokenizer.ggml.{field}") == expected.field(f"tokenizer.ggml.{field}")
    for name in expected.shapes:
        values = expected.read(name)
        if values.ndim == 2 and kind == gguf.GGMLQuantizationType.BF16:
            values = values.astype("bfloat16").astype(np.float32)
        np.testing.assert_array_equal(found.read(name), values)
