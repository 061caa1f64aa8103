"""`benchmarks/gpu.py`, on a CPU and a tiny shape: all that it measures on a GPU is measured, so that it works the first time there."""

import json
import math

import commands
import pytest


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch, commands.loaded("benchmarks/gpu.py") as module:
        patch.setenv("EESD_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(module, "STEPS", 2)
        patch.setattr(module, "REPEATS", 1)
        yield module


@pytest.mark.slow
def test_everything_is_measured(command, tmp_path):
    shape = ("--shape=tiny", "--dtype=float32", "--batch_sizes=1,2", "--max_draft=2", "--rows=2", "--sequence_length=16")
    result = commands.run(command, *shape, "--model=tiny", f"--json={tmp_path / 'gpu.json'}")
    assert result.code == 0, result.err
    found = json.loads((tmp_path / "gpu.json").read_text())
    for batch, decoding in zip((1, 2), found["decoding"], strict=True):
        assert decoding["batch_size"] == batch
        assert decoding["share_of_bound"] == pytest.approx(decoding["bound_ms"] / decoding["plain_ms"])
        assert decoding["tokens_per_second"] == pytest.approx(1e3 * batch / decoding["plain_ms"])
        rounds = [decoding[name] for name in ("round_bounds_ms", "rounds_ms", "looked_up_rounds_ms", "rounds_with_candidates_ms")]
        assert [len(of_kind) for of_kind in rounds] == [3] * 4
        assert all(0 < value < math.inf for of_kind in rounds for value in of_kind)
        assert all(0 < decoding[name] < math.inf for name in ("plain_ms", "bound_ms"))
    training = found["training"]
    assert training["tokens_per_second"] == pytest.approx(2 * 16 / training["step_ms"] * 1e3)
    assert training["share_of_peak"] == pytest.approx(training["tflops_per_second"] / training["peak_tflops_per_second"])
    assert found["model"]["identical"] is True
    assert "of bound" in result.out
    assert "training step" in result.out
    assert "tiny: plain" in result.out


def test_what_a_chip_needs_is_counted_without_running_anything(command, tmp_path, monkeypatch):
    """By hand, for Llama-2-13B in bfloat16 behind 32 tokens: all weights but the embeddings are read once in a round without drafts."""
    monkeypatch.setattr(command, "make_engine", lambda *_: pytest.fail("weights were drawn"))
    result = commands.run(command, "--count=NVIDIA H200", "--batch_sizes=1,8", "--max_draft=4", f"--json={tmp_path / 'count.json'}")
    assert result.code == 0, result.err
    found = json.loads((tmp_path / "count.json").read_text())["counted"]
    hidden, mlp, blocks, vocabulary, tokens = 5120, 13824, 40, 32000, 32
    block = 4 * hidden**2 + 3 * hidden * mlp
    branch_keys, norms, caches = 2 * hidden**2, (2 * blocks + 1) * hidden, 2 * blocks * hidden * tokens
    parts = found[0]["parts"]
    read = parts["blocks 1..5, one token"]["bytes"] + parts["verify 1"]["bytes"]
    assert read == 2 * (blocks * block + vocabulary * hidden + branch_keys + norms + caches)
    products = 2 * (blocks * block + vocabulary * hidden + branch_keys) + 4 * blocks * hidden * tokens
    for batch, of_batch in zip((1, 8), found, strict=True):
        assert of_batch["parts"]["blocks 1..5, one token"]["flops"] + of_batch["parts"]["verify 1"]["flops"] == batch * products
    assert found[0]["round_bounds_ms"][0] == pytest.approx(1e3 * read / 4.8e12)
    assert found[0]["round_bounds_ms"] == sorted(found[0]["round_bounds_ms"])
    assert "exit block, head" in result.out


@pytest.mark.parametrize(
    ("argument", "named"),
    [
        ("--batch_sizes=1,x", ["--batch_sizes is '1,x'", "positive integers"]),
        ("--dtype=float16", ["--dtype is 'float16'", "float32 or bfloat16"]),
        ("--count=abacus", ["--count is 'abacus'", "NVIDIA H200"]),
        ("--sequence_length=1", ["--sequence_length is 1", "integer >= 2"]),
    ],
)
def test_mistakes(command, argument, named):
    commands.assert_refused(commands.run(command, argument), *named)
