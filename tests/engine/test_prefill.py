"""Prompts of different lengths, together and one after the other."""

import functools
from typing import Any

import jax
import numpy as np
import pytest
import tiny

from eesd_jax import DecodeConfig, Engine
from eesd_jax.config import DraftConfig
from eesd_jax.decode.controllers import Calibration, Fixed
from eesd_jax.decode.state import LENGTH, RUNNING, DecodeState
from eesd_jax.engine import engine, prefill
from eesd_jax.engine.drafter import Drafter
from eesd_jax.model import exit_branch

OPTIONS = DecodeConfig(max_new_tokens=6, prompt_buckets=(8, 16), min_capacity=32)
RANDOM = np.random.default_rng(0)
PROMPTS = [RANDOM.integers(3, 300, size=length).tolist() for length in (4, 1, 13, 37, 2)]


@functools.cache
def make_engine(exit_layer: int, deep_input: bool) -> Engine:
    model = tiny.loaded_model()._replace(eos_ids=())
    branch = exit_branch.init_exit_branch(model.config, model.params, exit_layer, "next", deep_input=deep_input)
    return Engine(model, OPTIONS, Drafter(branch, DraftConfig(exit_layer, 3, (4,)), Calibration(), trained=False))


def whole(state: DecodeState) -> Any:
    """As numpy, without what lies behind a row's tokens, which is garbage."""
    state = state._replace(row_keys=jax.random.key_data(state.row_keys))
    state = jax.tree.map(np.array, state)
    caches = [*state.cache.k, *state.cache.v]
    if state.draft is not None:
        caches += [*state.draft.exit_cache.k, *state.draft.exit_cache.v]
    for row, length in enumerate(state.length):
        state.tokens[row, length:] = 0
        for entries in caches:  # [B, heads, head_dim, S] and [B, heads, S, head_dim]
            slots = entries.shape.index(state.tokens.shape[1], 2)
            entries[(row, *[slice(None)] * (slots - 1), slice(length - 1, None))] = 0
    return state


@pytest.mark.parametrize("shape", [None, (2, False), (0, True)], ids=["plain", "branch", "deep"])
def test_one_after_the_other_gives_what_all_together_give(shape: tuple[int, bool] | None, monkeypatch: pytest.MonkeyPatch):
    """With rows that only fill the batch up, and a prompt of several chunks."""
    lm, controller = make_engine(*shape or (2, False)), Fixed(2) if shape else None
    seeds, passes = [3, 1, 4, 1, 5], []
    real = engine._prefill
    monkeypatch.setattr(engine, "_prefill", lambda *arguments, **options: passes.append(arguments[3].shape) or real(*arguments, **options))
    one_by_one = lm.prefill(PROMPTS, seeds, 7, 6, controller)
    assert passes == [(1, 8), (1, 8), (1, 8), (1, 16), (1, 48), (1, 8)]
    monkeypatch.setattr(prefill, "_WORTH_IT", 0)
    together = lm.prefill(PROMPTS, seeds, 7, 6, controller)
    assert passes[6:] == [(7, 48)]
    assert one_by_one.finish.tolist() == [RUNNING] * 5 + [LENGTH] * 2
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), whole(one_by_one), whole(together))
    before = engine._decode_plain._cache_size()
    if controller is None:  # the next program takes either
        ends = [lm.decode(state, engine.SamplingConfig(), None, 3) for state in (one_by_one, together)]
        assert ends[0].tokens.tolist() == ends[1].tokens.tolist()
        assert engine._decode_plain._cache_size() <= before + 1


def test_prompts_of_like_lengths_run_together():
    assert not prefill.worth_one_by_one(OPTIONS, [7, 8, 5], 3)
    assert not prefill.worth_one_by_one(OPTIONS, [16, 9, 8], 3)  # 40 tokens, or 48
    assert prefill.worth_one_by_one(OPTIONS, [16, 8, 8], 3)  # 32, or 48
    assert prefill.worth_one_by_one(OPTIONS, [8], 16)  # the others are all alike
    assert not prefill.worth_one_by_one(OPTIONS, [300], 1)


def test_chunks_fill_what_they_are_written_to():
    for config in (OPTIONS, DecodeConfig(), DecodeConfig(prompt_buckets=(100,), min_capacity=48)):
        for prompt in range(1, 3000, 7):
            for text in (prompt + 1, prompt + 20, prompt + 500):
                padded, capacity = prefill.bucket_shapes(config, prompt, text)
                assert prompt <= padded <= capacity and text <= capacity
                assert padded in config.prompt_buckets or padded % config.prompt_buckets[-1] == 0
