import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from eesd_jax import DecodeConfig, Engine, SamplingConfig, UserError
from eesd_jax.engine import engine
from eesd_jax.model import cache, llama
from eesd_jax.model.tree import with_others

PROMPTS = [[5, 9, 200, 31], [7], [11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23], [250, 3]]
BUCKETS = DecodeConfig(max_new_tokens=12, prompt_buckets=(8, 16), min_capacity=32, stream_chunk=3)
SAMPLED = SamplingConfig(temperature=0.9, top_k=40, top_p=0.95)


@pytest.fixture(scope="module")
def lm() -> Engine:
    return Engine(tiny.loaded_model()._replace(eos_ids=()), BUCKETS)


def tokens_of(lm: Engine, prompts: list[list[int]], **options) -> list[list[int]]:
    options = {"seeds": [100 + len(prompt) for prompt in prompts]} | options
    return [generation.token_ids for generation in lm.generate_ids(prompts, **options)]


def whole_pass_logits(lm: Engine, ids: list[int]) -> np.ndarray:
    """Logits [T, V] without a cache."""
    config, params = lm.model.config, lm.model.params
    x = llama.embed(params, jnp.array([ids]))
    x, _ = llama.forward_blocks(config, params["blocks"], x, jnp.zeros(1, jnp.int32), None, range(config.num_layers))
    return np.asarray(llama.logits(config, params, x)[0])


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_tokens_of_a_tree_see_their_own_way_alone(kind: str):
    """Each is as if the tokens on its way from the root were the whole text, in a sliding window, too."""
    model = tiny.loaded_model(kind, **({"sliding_window": 4} if kind == "mistral" else {}))
    lm, prompts = Engine(model), [[5, 9, 200, 31, 7, 8], [11, 12, 13]]
    width = max(map(len, prompts))
    tree = with_others(3, 2)
    assert tree.parents == (-1, 0, 1, 0, 0, 1, 1)
    branches = np.random.default_rng(1).integers(3, 300, (2, len(tree.parents)))

    @jax.jit
    def run(params: llama.Params) -> jax.Array:
        config, length = model.config, jnp.array([len(prompt) for prompt in prompts])
        padded = jnp.array([prompt + [0] * (width - len(prompt)) for prompt in prompts])
        every = range(config.num_layers)
        _, held = llama.forward_blocks(config, params["blocks"], llama.embed(params, padded), 0 * length, None, every)
        held = cache.pad(held, 10)
        x, new = llama.forward_blocks(config, params["blocks"], llama.embed(params, jnp.array(branches)), length, held, every, tree)
        assert new.k[0].shape[3] == len(tree.parents)
        return llama.logits(config, params, x)

    logits = np.asarray(run(lm.params))
    for row, prompt in enumerate(prompts):
        for slot in range(len(tree.parents)):
            way, at = [], slot
            while at >= 0:
                way, at = [int(branches[row, at]), *way], tree.parents[at]
            assert len(way) == tree.offsets[slot] + 1
            np.testing.assert_allclose(logits[row, slot], whole_pass_logits(lm, prompt + way)[-1], atol=1e-4)


def test_greedy_tokens_are_the_argmax_of_uncached_logits(lm: Engine):
    for prompt, new in zip(PROMPTS, tokens_of(lm, PROMPTS), strict=True):
        logits = whole_pass_logits(lm, prompt + new)
        assert new == np.argmax(logits[len(prompt) - 1 : -1], axis=-1).tolist()
        assert len(new) == BUCKETS.max_new_tokens


@pytest.mark.parametrize("sampling", [SamplingConfig(), SAMPLED], ids=["greedy", "sampled"])
def test_a_row_in_a_batch_gives_what_it_gives_alone(lm: Engine, sampling: SamplingConfig):
    alone = [tokens_of(lm, [prompt], sampling=sampling)[0] for prompt in PROMPTS]
    assert tokens_of(lm, PROMPTS, sampling=sampling) == alone
    assert tokens_of(lm, PROMPTS[::-1], sampling=sampling) == alone[::-1]
    assert tokens_of(lm, PROMPTS[:3], sampling=sampling, batch_size=4) == alone[:3]


@pytest.mark.parametrize("length", [17, 30, 40])
def test_a_prompt_run_in_chunks_gives_what_one_pass_gives(lm: Engine, length: int):
    """Also where half a chunk more would be room enough."""
    prompt = np.random.default_rng(0).integers(3, 300, size=length).tolist()
    in_chunks = Engine(lm.model, dataclasses.replace(BUCKETS, max_new_tokens=4, min_capacity=16))
    one_pass = Engine(lm.model, DecodeConfig(max_new_tokens=4, prompt_buckets=(64,)))
    assert tokens_of(in_chunks, [prompt, PROMPTS[0]]) == tokens_of(one_pass, [prompt, PROMPTS[0]])


def test_a_sliding_window_counts_in_the_cache_too():
    windowed = Engine(tiny.loaded_model("mistral", sliding_window=5)._replace(eos_ids=()), BUCKETS)
    (new,) = tokens_of(windowed, PROMPTS[2:3])
    logits = whole_pass_logits(windowed, PROMPTS[2] + new)
    assert new == np.argmax(logits[len(PROMPTS[2]) - 1 : -1], axis=-1).tolist()


def test_seeds_reproduce_and_matter(lm: Engine):
    first, again, other = (tokens_of(lm, PROMPTS[:1], sampling=SAMPLED, seeds=[seed])[0] for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_eos_ends_a_row_at_every_position_and_leaves_the_others_alone(lm: Engine):
    free = tokens_of(lm, PROMPTS[:2], max_new_tokens=8)
    for position in range(8):
        eos = free[0][position]
        ended = Engine(lm.model._replace(eos_ids=(eos, 319)), BUCKETS)
        for row, generation in enumerate(ended.generate_ids(PROMPTS[:2], seeds=[0, 0], max_new_tokens=8)):
            expected = free[row][: free[row].index(eos) + 1] if eos in free[row] else free[row]
            assert generation.token_ids == expected
            assert generation.finish_reason == ("eos" if eos in free[row] else "length")
            assert generation.rounds == len(expected)


def test_stop_strings_end_a_text_at_every_position(lm: Engine):
    free = lm.generate_ids(PROMPTS[:1], seeds=[0])[0]
    for start in range(len(free.text) - 1):
        stop = free.text[start : start + 2]
        if "\ufffd" in stop:  # an incomplete character at the very end of the text is no character
            continue
        got = lm.generate_ids(PROMPTS[:1], seeds=[0], stop=[stop])[0]
        assert got.text == free.text[: free.text.index(stop)]
        assert got.finish_reason == "stop"
        assert got.token_ids == free.token_ids[: len(got.token_ids)]
        # The last token is the one that completed the stop string.
        assert stop in lm.model.tokenizer.decode(got.token_ids)
        assert stop not in lm.model.tokenizer.decode(got.token_ids[:-1])


def test_streamed_pieces_are_the_text(lm: Engine):
    whole = lm.generate("hello", sampling=SAMPLED, seed=5)
    pieces = list(lm.stream("hello", sampling=SAMPLED, seed=5))
    assert "".join(pieces) == whole.text


def test_the_budget_is_cut_at_the_context(lm: Engine):
    context = lm.model.config.context_length
    prompt = [5] * (context - 3)
    generation = lm.generate_ids([prompt], seeds=[0], max_new_tokens=50)[0]
    assert len(generation.token_ids) == 3
    assert generation.finish_reason == "length"
    with pytest.raises(UserError, match=f"context is {context}"):
        lm.encode("hello " * context, chat=False)


def test_new_prompts_settings_and_budgets_do_not_compile(lm: Engine):
    tokens_of(lm, PROMPTS[:2])
    compiled = engine._prefill._cache_size(), engine._decode_plain._cache_size()
    tokens_of(lm, [[8, 9], [10, 11, 12]], sampling=SAMPLED, max_new_tokens=5)
    tokens_of(lm, [[300], [1, 2, 3, 4, 5]], sampling=SamplingConfig(temperature=0.3, min_p=0.1), stop=["zzz"])
    list(lm.generate_ids([[4], [5]], seeds=[1, 2], max_new_tokens=2))
    assert (engine._prefill._cache_size(), engine._decode_plain._cache_size()) == compiled


@pytest.mark.parametrize("batch", [1, 4])
def test_caches_stay_in_place(lm: Engine, batch: int):
    config, capacity = lm.model.config, 32
    ones, keys = jnp.ones(batch, jnp.int32), jax.random.split(jax.random.key(0), batch)
    prompt = jnp.zeros((batch, 8), jnp.int32)
    state, _ = engine._prefill(config, lm.model.params, None, prompt, ones, 2 * ones, keys, exit_layer=3, capacity=capacity, chunk=16)
    settings = engine._sampling_arrays(SamplingConfig(), batch, None)
    program = engine._decode_plain.lower(config, jnp.zeros(1, jnp.int32), lm.model.params, settings, state, jnp.int32(1)).compile()
    shapes = {str(list(leaf.shape)).replace(" ", "") for leaf in jax.tree.leaves(state.cache)}
    copied = re.findall(r"= f32(\[[\d,]+\])\S* copy(?:-start)?\(", program.as_text())
    assert not shapes & set(copied)
    # Donated: the new caches lie where the old ones lay.
    assert program.memory_analysis().alias_size_in_bytes >= sum(leaf.nbytes for leaf in jax.tree.leaves(state.cache))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="where XLA takes them anew otherwise")
def test_sines_are_taken_once_a_pass(lm: Engine):
    config, params, start = lm.model.config, lm.model.params, jnp.zeros(2, jnp.int32)

    @functools.partial(jax.jit, static_argnums=0)
    def run(blocks: int, start: jax.Array) -> tuple[jax.Array, cache.KVCache]:
        before = cache.empty(config, 2, 64, jnp.float32)
        x = llama.embed(params, jnp.ones((2, 3), jnp.int32))
        return llama.forward_blocks(config, params["blocks"], x, start, before, range(blocks))

    sines = [len(re.findall(r" sine\(", run.lower(blocks, start).compile().as_text())) for blocks in (1, 3)]
    assert sines[0] == sines[1] > 0


def test_wrong_options_are_refused(lm: Engine):
    with pytest.raises(UserError, match="max_new_tokens is 0"):
        tokens_of(lm, PROMPTS[:1], max_new_tokens=0)
    with pytest.raises(UserError, match="2 seeds for 1 prompts"):
        tokens_of(lm, PROMPTS[:1], seeds=[1, 2])
    for wrong in ({"temperature": -1}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.1}, {"min_p": 1}):
        with pytest.raises(UserError, match=f"{next(iter(wrong))} is"):
            SamplingConfig(**wrong)
