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
        rounds = [decoding[name] for name in ("rounds_ms", "looked_up_rounds_ms", "rounds_with_candidates_ms")]
        assert [len(of_kind) for of_kind in rounds] == [3, 3, 3]
        assert all(0 < value < math.inf for of_kind in rounds for value in of_kind)
        assert all(0 < decoding[name] < math.inf for name in ("plain_ms", "bound_ms"))
    training = found["training"]
    assert training["tokens_per_second"] == pytest.approx(2 * 16 / training["step_ms"] * 1e3)
    assert training["share_of_peak"] == pytest.approx(training["tflops_per_second"] / training["peak_tflops_per_second"])
    assert found["model"]["identical"] is True
    assert "of bound" in result.out
    assert "training step" in result.out
    assert "tiny: plain" in result.out


@pytest.mark.parametrize(
    ("argument", "named"),
    [
        ("--batch_sizes=1,x", ["--batch_sizes is '1,x'", "positive integers"]),
        ("--dtype=float16", ["--dtype is 'float16'", "float32 or bfloat16"]),
        ("--sequence_length=1", ["--sequence_length is 1", "integer >= 2"]),
    ],
)
def test_mistakes(command, argument, named):
    commands.assert_refused(commands.run(command, argument), *named)
