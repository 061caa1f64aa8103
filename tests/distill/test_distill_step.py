"""One step of training: the same on every mesh and in parts, and what it sees of packed rows is what decoding sees."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from experiments import make_config, prepare, write_dataset

from eesd_jax.config import ExperimentConfig, MeshConfig
from eesd_jax.distill import data, step, teacher, trainer
from eesd_jax.distill.layout import make_layout
from eesd_jax.errors import UserError
from eesd_jax.model import cache as kv
from eesd_jax.model import exit_branch, llama, ops, sharding, stored

MESHES = {"data 8": (8, 1, 1), "data 4, fsdp 2": (4, 2, 1), "data 2, fsdp 2, tensor 2": (2, 2, 2)}
MORE_MESHES = {"data 4, tensor 2": (4, 1, 2), "fsdp 2, tensor 4": (1, 2, 4), "fsdp 8": (1, 8, 1), "tensor 8": (1, 1, 8)}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> str:
    return write_dataset(tmp_path_factory.mktemp("data") / "dataset")


def first_batch(run: trainer.Run) -> data.Batch:
    return next(data.make_loader(run.rows, run.config.batch_size, run.config.seed, 0, 1))


# A step ---------------------------------------------------------------------------------------------------------------------------------


def one_step(run: trainer.Run) -> tuple[step.TrainState, step.Metrics]:
    batch = run.layout.place(first_batch(run))
    state, metrics = run.compile_step()(run.initial, trainer.Input(batch, None, {}, 0))
    return jax.device_get(state), jax.device_get(metrics)


def assert_same_step(found: tuple, wanted: tuple) -> None:
    """Loss, gradients (AdamW's first moments hold them) and parameters within 1e-5, relative to the size of each."""
    for (path, leaf), right in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(wanted), strict=True):
        distance, size = np.linalg.norm(np.float64(leaf) - right), np.linalg.norm(np.float64(right))
        assert distance <= 1e-5 * size, f"{jax.tree_util.keystr(path)}: {distance / size}"


@pytest.fixture(scope="module")
def mixed(dataset, tmp_path_factory) -> ExperimentConfig:
    """All losses at once, a reduced draft vocabulary and a trained head."""
    config = make_config(dataset, tmp_path_factory.mktemp("mixed"), batch_size=8)
    weights = {"soft": 0.5, "reverse_kl": 0.25, "total_variation": 0.5, "hard": 0.25, "regression": 0.1}
    return dataclasses.replace(
        config,
        branch=dataclasses.replace(config.branch, draft_vocab=64, train_head=True),
        loss=dataclasses.replace(config.loss, **weights),
        optimizer=dataclasses.replace(config.optimizer, learning_rate=1e-3, warmup_steps=0, clip_norm=0.0),
    )


@pytest.fixture(scope="module")
def alone(mixed) -> tuple[step.TrainState, step.Metrics]:
    """The step of one device."""
    state, metrics = one_step(prepare(mixed))
    assert all(np.any(leaf) for leaf in jax.tree.leaves(state.optimizer[0].mu))
    assert metrics.positions > 100
    return state, metrics


def slow(cases: dict[str, Any]) -> list[Any]:
    return [pytest.param(case, id=name, marks=pytest.mark.slow) for name, case in cases.items()]


@pytest.mark.parametrize("mesh", [*(pytest.param(mesh, id=name) for name, mesh in MESHES.items()), *slow(MORE_MESHES)])
def test_a_step_on_a_mesh_is_that_of_one_device(mixed, alone, mesh):
    sizes = dict(zip(sharding.MESH_AXES, mesh, strict=True))
    config = dataclasses.replace(mixed, mesh=dataclasses.replace(mixed.mesh, **sizes))
    layout = make_layout(config)
    assert dict(layout.mesh.shape) == sizes
    run = prepare(config, layout)
    assert (not run.initial.trained.block["wq"].sharding.is_fully_replicated) == (sizes["fsdp"] * sizes["tensor"] > 1)
    assert_same_step(one_step(run), alone)


def test_data_alone_lies_across_slices(mixed, alone, monkeypatch):
    """Two virtual slices, whose devices take turns in the list of all."""
    monkeypatch.setattr("eesd_jax.model.sharding._slice_of", lambda device: device.id % 2)
    config = dataclasses.replace(mixed, mesh=MeshConfig(data=2, fsdp=4))
    layout = make_layout(config)
    assert [{device.id % 2 for device in part.flat} for part in layout.mesh.devices] == [{0}, {1}]
    assert_same_step(one_step(prepare(config, layout)), alone)
    with pytest.raises(UserError, match=r"data 1 x fsdp 8 .* over 2 slices; expected a multiple of 2 for data"):
        make_layout(dataclasses.replace(mixed, mesh=MeshConfig(data=1, fsdp=8)))


@pytest.mark.parametrize("parts", [2, *slow({"4": 4})])
def test_accumulated_parts_are_the_whole_batch(mixed, alone, parts):
    config = dataclasses.replace(mixed, optimizer=dataclasses.replace(mixed.optimizer, accumulate=parts))
    assert_same_step(one_step(prepare(config)), alone)


# A quantised trunk ---------------------------------------------------------------------------------------------------------------------


def test_a_quantised_trunk_teaches_what_its_numbers_would(dataset, tmp_path):
    config = make_config(dataset, tmp_path, quantize="int4")
    run, dense = prepare(config), prepare(dataclasses.replace(config, quantize="none"))
    numbers = functools.partial(jax.tree.map, functools.partial(stored.to_dense, dtype=jnp.float32), is_leaf=is_quantized)
    assert is_quantized(run.frozen.trunk.early["wq"])
    assert not np.array_equal(numbers(run.frozen.trunk.early["wq"]), dense.frozen.trunk.early["wq"])
    dense.frozen, dense.initial = numbers(run.frozen), jax.tree.map(jnp.copy, run.initial)
    wanted = one_step(dense)
    assert_same_step(one_step(run), wanted)
    assert wanted[1].loss > 0


def is_quantized(leaf: Any) -> bool:
    return isinstance(leaf, stored.Quantized)


@pytest.mark.slow
def test_a_quantised_trunk_on_a_mesh_is_that_of_one_device(dataset, tmp_path):
    config = make_config(dataset, tmp_path, quantize="int4", batch_size=8)
    many = dataclasses.replace(config, mesh=MeshConfig(data=2, fsdp=2, tensor=2))
    assert_same_step(one_step(prepare(many, make_layout(many))), one_step(prepare(config)))


# Packed rows ------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[False, True], ids=["one input", "two inputs"])
def packed(request, dataset, tmp_path_factory) -> tuple[trainer.Run, data.Batch, jax.Array, jax.Array]:
    """A run, a batch of packed rows, h_N on it, and the branch's output."""
    config = make_config(dataset, tmp_path_factory.mktemp("packed"))
    run = prepare(dataclasses.replace(config, branch=dataclasses.replace(config.branch, deep_input=request.param)))
    batch = first_batch(run)
    return run, batch, *seen(run, batch)


def seen(run: trainer.Run, batch: data.Batch) -> tuple[jax.Array, jax.Array]:
    return jax.jit(_seen, static_argnums=0)(run.model_config, run.initial.trained, run.frozen, batch)


def _seen(config, trained, frozen, batch):
    hidden, last = teacher.hidden_states(config, frozen.trunk, batch, last=True)
    deep = None if trained.fusion is None else last
    return hidden, step.branch_output(config, step.to_branch(trained, frozen, jnp.float32), hidden, deep, batch)


def pieces(batch: data.Batch) -> list[tuple[int, np.ndarray]]:
    """Row and places of every example in a batch."""
    found = [(row, np.flatnonzero(ids == s)) for row, ids in enumerate(batch.segments) for s in range(1, ids.max() + 1)]
    assert len(found) > len(batch.row)
    return found


def test_what_a_step_sees_of_a_packed_example_is_what_decoding_sees(packed):
    """Hidden states of block N by the decoder's own blocks, and the branch by its exit block, a token at a time with a cache."""
    run, batch, hidden, outputs = packed
    config, exit_layer = run.model_config, run.config.branch.exit_layer
    params = teacher.join_trunk(config, run.frozen.trunk)
    branch = step.to_branch(run.initial.trained, run.frozen, jnp.float32)
    width = batch.tokens.shape[1]

    @jax.jit
    def alone(tokens_1xT):
        x, start_1 = llama.embed(params, tokens_1xT), jnp.zeros(1, jnp.int32)
        x = llama.forward_blocks(config, params["blocks"], x, start_1, None, range(exit_layer))[0]
        late = llama.forward_blocks(config, params["blocks"], x, start_1, None, range(exit_layer, config.num_layers))[0]
        deep = llama.last_hidden(config, params, late)
        return x, exit_branch.before(jnp.zeros_like(deep[:, 0]), deep)

    @jax.jit
    def one_token(hidden_1x1xD, deep_1x1xD, cache, start_1):
        x = exit_branch.fuse(config, branch, hidden_1x1xD, deep_1x1xD)
        x, entries = exit_branch.run_exit_block(config, branch, x, start_1, cache)
        return exit_branch.draft_output(config, branch, x), kv.write(cache, entries, start_1, x)

    for row, places in pieces(batch)[:6]:
        tokens = np.zeros((1, width), np.int32)
        tokens[0, : len(places)] = batch.tokens[row, places]
        decoded, deep = (x[0, : len(places)] for x in alone(tokens))
        np.testing.assert_allclose(hidden[row, places], decoded, rtol=1e-4, atol=1e-5)
        cache = kv.empty(config, 1, width, jnp.float32, blocks=1)
        for t, place in enumerate(places):
            output, cache = one_token(decoded[None, t : t + 1], deep[None, t : t + 1], cache, jnp.array([t]))
            np.testing.assert_allclose(outputs[row, place], output[0, 0], rtol=1e-4, atol=1e-5)


def test_packed_examples_do_not_see_each_other(packed):
    run, batch, hidden, outputs = packed
    (row, places), *_ = pieces(batch)
    others = batch.segments != batch.segments[row, places[0]]
    others[np.arange(len(others)) != row] = True
    changed = batch._replace(tokens=np.where(others, (batch.tokens + 7) % 100, batch.tokens))
    assert np.any(changed.tokens[row] != batch.tokens[row])
    for again, before in zip(seen(run, changed), (hidden, outputs), strict=True):
        np.testing.assert_array_equal(again[row, places], before[row, places])


@pytest.mark.parametrize(("wide", "count"), [(49152, 16), (1000, 3), (300, 16)])
def test_the_most_probable_tokens_are_those_of_a_whole_sort(wide, count):
    x = jnp.round(jax.random.normal(jax.random.key(0), (3, 5, wide)) * 4) / 4  # many are equal
    for found, expected in zip(jax.jit(ops.top_k, static_argnums=1)(x, count), jax.lax.top_k(x, count), strict=True):
        np.testing.assert_array_equal(found, expected)
