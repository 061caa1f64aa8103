"""The exit branch: what it starts from, which tokens it scores, and what shapes it must have."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from eesd_jax.errors import UserError
from eesd_jax.model import cache as kv
from eesd_jax.model import llama, sharding
from eesd_jax.model.config import ModelConfig
from eesd_jax.model.exit_branch import (
    ExitBranch,
    abstract_exit_branch,
    draft_logits,
    draft_output,
    exit_branch_shardings,
    init_exit_branch,
    run_exit_block,
)

FAMILIES = {
    "llama": ("llama", {}),
    "llama-tied-biases": ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {"sliding_window": 3}),
    "qwen2": ("qwen2", {}),
    "qwen3-wide-heads": ("qwen3", {"head_dim": 16}),
}
BATCH, LENGTH = 2, 7
IDS = np.array([0, 3, 17, 200, 319])


@pytest.fixture(params=FAMILIES, scope="module")
def target(request) -> tuple[ModelConfig, llama.Params]:
    model_type, overrides = FAMILIES[request.param]
    config = tiny.config(model_type, **overrides)
    return config, tiny.params(config)


@functools.partial(jax.jit, static_argnums=(0, 2))
def hidden(config: ModelConfig, params: llama.Params, exit_layer: int) -> jax.Array:
    """The residual stream behind block N, of random tokens."""
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (BATCH, LENGTH))
    x = llama.embed(params, jnp.asarray(tokens))
    return llama.forward_blocks(config, params["blocks"], x, jnp.zeros(BATCH, jnp.int32), None, range(exit_layer))[0]


run = jax.jit(run_exit_block, static_argnums=0)


def logits_of(config: ModelConfig, branch: ExitBranch, h: jax.Array) -> np.ndarray:
    x, _ = run(config, branch, h, jnp.zeros(BATCH, jnp.int32), None)
    return np.asarray(draft_logits(branch, draft_output(config, branch, x)))


def test_zero_start_is_a_logit_lens(target):
    config, params = target
    for exit_layer in (1, 2):
        h = hidden(config, params, exit_layer)
        branch = init_exit_branch(config, params, exit_layer, "zero")
        np.testing.assert_array_equal(logits_of(config, branch, h), llama.logits(config, params, h))


def test_last_start_behind_all_other_blocks_is_the_model(target):
    config, params = target
    branch = init_exit_branch(config, params, config.num_layers - 1, "last")
    whole = llama.logits(config, params, hidden(config, params, config.num_layers))
    ours = logits_of(config, branch, hidden(config, params, config.num_layers - 1))
    np.testing.assert_allclose(ours, whole, rtol=1e-5, atol=1e-5)


def test_starts_copy_the_block_they_say(target):
    config, params = target
    for start, layer in (("last", config.num_layers - 1), ("next", 1)):
        branch = init_exit_branch(config, params, 1, start)
        jax.tree.map(np.testing.assert_array_equal, branch.block, params["blocks"][layer])
    zero = init_exit_branch(config, params, 1, "zero")
    changed = {name for name, weight in zero.block.items() if not np.array_equal(weight, params["blocks"][1][name])}
    assert changed == {"wo", "w_down", "bo", "b_down"} & zero.block.keys()
    np.testing.assert_array_equal(branch.norm, params["final_norm"])
    np.testing.assert_array_equal(branch.head, params["embed" if config.tie_embeddings else "lm_head"])


def test_a_draft_vocabulary_scores_its_tokens_as_the_whole_one_does(target):
    config, params = target
    h = hidden(config, params, 1)
    whole, part = (init_exit_branch(config, params, 1, "next", ids) for ids in (None, IDS))
    np.testing.assert_array_equal(part.draft_ids, IDS)
    np.testing.assert_array_equal(part.head, whole.head[IDS])
    np.testing.assert_allclose(logits_of(config, part, h), logits_of(config, whole, h)[..., IDS], rtol=1e-5, atol=1e-5)


def test_with_a_cache_the_exit_block_gives_what_one_pass_gives(target):
    config, params = target
    h, start = hidden(config, params, 1), 3
    branch = init_exit_branch(config, params, 1, "next")
    whole, entries = run(config, branch, h, jnp.zeros(BATCH, jnp.int32), None)
    _, first = run(config, branch, h[:, :start], jnp.zeros(BATCH, jnp.int32), None)
    rest, later = run(config, branch, h[:, start:], jnp.full(BATCH, start), kv.pad(first, LENGTH))
    np.testing.assert_allclose(rest, whole[:, start:], rtol=1e-5, atol=1e-5)
    # Keys and values are plain projections: they do not depend on what came before.
    np.testing.assert_allclose(later.k[0], entries.k[0][..., start:], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(later.v[0], entries.v[0][:, :, start:], rtol=1e-5, atol=1e-5)


def test_abstract_branch_has_the_shapes_of_a_real_one(target):
    config, params = target
    for ids in (None, IDS):
        branch = init_exit_branch(config, params, 1, "last", ids)
        shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), abstract_exit_branch(config, branch.draft_ids.size))
        assert shapes == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), branch)


def test_shardings_are_those_of_the_target_and_fit_any_draft_vocabulary():
    config = tiny.config()
    mesh = sharding.make_mesh(fsdp=2, tensor=4)
    ours, theirs = exit_branch_shardings(config, 8, mesh), sharding.param_shardings(config, mesh)
    assert ours.block == theirs["blocks"][0]
    assert (ours.norm, ours.head) == (theirs["final_norm"], theirs["lm_head"])
    assert ours.draft_ids.is_fully_replicated
    branch = init_exit_branch(config, tiny.params(config), 1, "last", IDS)
    placed = jax.device_put(branch, exit_branch_shardings(config, IDS.size, mesh))  # five rows do not divide by four
    jax.tree.map(np.testing.assert_array_equal, placed, branch)


@pytest.mark.parametrize("exit_layer", [0, 3, -1])
def test_an_exit_needs_blocks_on_both_sides(exit_layer):
    with pytest.raises(UserError, match=f"exit_layer is {exit_layer}; expected 1 to 2 for a model of 3 blocks"):
        init_exit_branch(tiny.config(), tiny.params(tiny.config()), exit_layer, "last")


def test_unknown_start():
    with pytest.raises(UserError, match="'first'; expected one of last, next, zero"):
        init_exit_branch(tiny.config(), tiny.params(tiny.config()), 1, "first")


@pytest.mark.parametrize(
    ("ids", "named"),
    [
        ([1, 3, 2], "id 2 behind id 3"),
        ([1, 3, 3], "id 3 behind id 3"),
        ([1, 320], "has id 320"),
        ([-1, 3], "has id -1"),
        ([], r"shape \[0\]"),
        ([[1, 2]], r"shape \[1, 2\]"),
        ([0.5], "dtype float64"),
    ],
)
def test_a_draft_vocabulary_is_increasing_ids_of_the_vocabulary(ids, named):
    with pytest.raises(UserError, match=f"draft vocabulary has .*{named}.*; expected increasing ids from 0 to 319|{named}"):
        init_exit_branch(tiny.config(), tiny.params(tiny.config()), 1, "last", np.array(ids))
