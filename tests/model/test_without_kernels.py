"""The package without its folder `kernels/`: everything runs, in plain JAX, and loads no LLVM."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

REPOSITORY = pathlib.Path(__file__).parents[2]
# Greedy texts are plain decoding's; where they part, float32 cannot tell the two tokens apart (1e-3, as everywhere).
GREEDY = """
import sys
import jax.numpy as jnp
import eesd_jax
from eesd_jax.model import llama

lm = eesd_jax.load("tiny", dtype="float32", exit_branch="none", arms=["lookup"], max_draft=2)
prompts = [[5, 9, 20, 5, 9, 20, 5], [7]]
plain, drafted = (lm.generate_ids(prompts, seeds=[0, 0], max_new_tokens=24, controller=name) for name in ("plain", "fixed:2"))
assert sum(text.accepted for text in drafted) > 0
for prompt, one, other in zip(prompts, plain, drafted, strict=True):
    parts = [i for i, (a, b) in enumerate(zip(one.token_ids, other.token_ids, strict=True)) if a != b]
    if parts:
        config, tokens = lm.model.config, jnp.array([prompt + one.token_ids[: parts[0]]])
        x = llama.embed(lm.params, tokens)
        x, _ = llama.forward_blocks(config, lm.params["blocks"], x, jnp.zeros(1, jnp.int32), None, range(config.num_layers))
        second, first = jnp.sort(llama.logits(config, lm.params, x)[0, -1])[-2:]
        assert first - second < 1e-3, (one.token_ids, other.token_ids)
assert "llvmlite" not in sys.modules
"""
# The model, the decoder's invariants, and a cell of the law.
CHOSEN = (
    "engine/test_decode.py::test_greedy_tokens_are_the_argmax_of_uncached_logits",
    "decode/test_round.py::test_invariants_hold_after_every_round",
    "decode/test_round.py::test_greedy_tokens_are_those_of_plain_decoding_in_any_batch",
    "decode/test_losslessness.py::test_texts_follow_the_law_of_the_target[threshold]",
)


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder with a copy of the package that has no kernels."""
    folder = tmp_path_factory.mktemp("bare")
    ignored = shutil.ignore_patterns("kernels", "branches", "__pycache__")
    shutil.copytree(REPOSITORY / "eesd_jax", folder / "eesd_jax", ignore=ignored)
    return folder


def run(folder: pathlib.Path, *arguments: str) -> None:
    """Runs Python where that package is found first."""
    environment = os.environ | {"PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]


def test_speculation_says_what_plain_decoding_says(bare):
    run(bare, "-c", GREEDY)


@pytest.mark.slow
def test_tests_of_the_decoder_pass(bare):
    tests = [str(REPOSITORY / "tests" / name) for name in CHOSEN]
    settings = ("-c", str(REPOSITORY / "pyproject.toml"), f"--rootdir={REPOSITORY}", "-p", "no:cacheprovider", "-n0", "-q")
    run(bare, "-m", "pytest", *settings, *tests)
