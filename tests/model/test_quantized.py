"""Quantised weights: what they stand for, the same on every mesh, and that speculation says what their model says by itself."""

import re

import commands
import generate_command
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
import tiny
from commands import assert_refused
from jax.sharding import PartitionSpec

import eesd_jax
from eesd_jax import Engine, UserError
from eesd_jax.config import LONGEST_MATCH, DecodeConfig, DraftConfig, ExperimentConfig, RefillConfig
from eesd_jax.decode.controllers import Calibration, Controller, Setup, build_controller, parse_controller
from eesd_jax.decode.costs import RoundCosts
from eesd_jax.engine.drafter import Drafter
from eesd_jax.engine.scheduler import Refiller, Request
from eesd_jax.model import exit_branch, llama, ops, sharding, stored
from eesd_jax.model.stored import Quantized, Stored
from eesd_jax.planning import counts, programs
from eesd_jax.weights import branch_folder
from eesd_jax.weights.load import LoadedModel, load_params, quantized_codes
from eesd_jax.weights.quantize import quantize

KINDS = ("int8", "int4")
# Inputs of 32, 96 and 256: with 4 bits one, three and two groups.
CONFIG = tiny.config(num_key_value_heads=4, hidden_size=96, intermediate_size=256)
PROMPTS = [[5, 9, 200, 5, 9, 200, 5], [7]]


def weight_of(outputs: int, inputs: int) -> np.ndarray:
    rng = np.random.default_rng(inputs)
    weight = rng.standard_normal((outputs, inputs), np.float32) * rng.uniform(0.01, 1, (outputs, 1)).astype(np.float32)
    weight[3] = 0  # an output that is not used has no largest number to go by
    return weight


def on_device(weight: Quantized) -> Quantized:
    return jax.tree.map(jnp.asarray, weight)


def load(kind: str, mesh: jax.sharding.Mesh | None = None, dtype: str = "float32", seed: int = 0) -> llama.Params:
    return load_params(CONFIG, tiny.ArraySource(tiny.tensors(CONFIG, seed)), jnp.dtype(dtype), mesh, kind)


# Codes and scales -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inputs", [32, 96, 576])
@pytest.mark.parametrize("kind", KINDS)
def test_every_number_is_within_half_a_step(kind, inputs):
    weight = weight_of(24, inputs)
    found = quantize(weight, kind)
    wanted = stored.shapes(weight.shape, kind)
    assert [(array.shape, array.dtype) for array in found] == [(array.shape, array.dtype) for array in wanted]
    dense = np.asarray(stored.to_dense(on_device(found), jnp.dtype("float32")))
    scale = np.asarray(found.scale, np.float32)
    step = np.repeat(scale, inputs // scale.shape[1], axis=1)
    # A scale with 8 significant bits is off by 2^-9 at most, and so is what is made of it.
    slack = 1e-6 if kind == "int8" else 2.0**-8
    assert np.all(np.abs(dense - weight) <= step * 0.5001 + slack * np.abs(weight))
    assert np.all(dense[3] == 0)
    np.testing.assert_array_equal(dense, qwix.dequantize(qwix.QArray(jnp.asarray(found.codes), jnp.asarray(scale))))


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_of_several_pieces_is_that_of_one(kind, monkeypatch):
    weight = weight_of(24, 64)
    whole = quantize(weight, kind)
    monkeypatch.setattr("eesd_jax.weights.quantize._PIECE", 7 * 64)
    jax.tree.map(np.testing.assert_array_equal, quantize(weight, kind), whole)


@pytest.mark.parametrize("kind", KINDS)
def test_products_are_those_of_the_numbers(kind):
    weight = on_device(quantize(weight_of(24, 576), kind))
    x = jax.random.normal(jax.random.key(0), (2, 3, 576))
    dense = stored.to_dense(weight, jnp.dtype("float32"))
    product = ops.linear(x, weight)
    np.testing.assert_allclose(product, ops.linear(x, dense), rtol=1e-5, atol=1e-5)
    many = jnp.tile(x, (10, 10, 1))  # so many that the matrix is made first
    np.testing.assert_allclose(ops.linear(many, weight), ops.linear(many, dense), rtol=1e-5, atol=1e-5)
    in_16_bits = ops.linear(x.astype(jnp.bfloat16), weight, preferred_element_type=jnp.float32)
    assert in_16_bits.dtype == jnp.float32
    assert np.abs(in_16_bits - product).max() < 0.02 * np.abs(product).max()
    assert ops.linear(x.astype(jnp.bfloat16), weight).dtype == jnp.bfloat16
    np.testing.assert_array_equal(stored.take_rows(weight, jnp.array([[5, 3], [0, 5]]), dense.dtype), dense[np.array([[5, 3], [0, 5]])])


@pytest.mark.parametrize("kind", KINDS)
def test_codes_for_kernels_stand_for_the_same_numbers(kind):
    weight = on_device(quantize(weight_of(32, 576), kind))
    x = jax.random.normal(jax.random.key(0), (3, 576))
    product = ops.linear(x, Stored(weight, ops.pack_codes(stored.of_quantized(weight))))
    np.testing.assert_allclose(product, ops.linear(x, stored.to_dense(weight, x.dtype)), rtol=1e-6, atol=1e-5)
    assert stored.of_quantized(on_device(quantize(weight_of(32, 48), kind))) is None


def test_a_loop_keeps_no_floats_of_the_weights():
    """XLA would make them once, in front of the loop, and hold them as long as it runs."""
    weight = on_device(quantize(weight_of(24, 64), "int8"))

    def decode(weight: Quantized, x: jax.Array) -> jax.Array:
        return jax.lax.while_loop(lambda x: jnp.sum(x) < 1e3, lambda x: x + jnp.pad(ops.linear(x, weight), ((0, 0), (0, 40))), x)

    text = jax.jit(decode).lower(weight, jnp.ones((4, 64))).compile().as_text()
    loops = [line for line in text.splitlines() if re.search(r"\) while\(", line)]
    assert len(loops) == 1
    assert "s8[24,64]" in loops[0]
    assert "f32[24,64]" not in loops[0]


# Params ---------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_params_on_a_mesh_are_those_of_one_device(kind):
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    whole, parts = load(kind), load(kind, mesh)
    jax.tree.map(np.testing.assert_array_equal, parts, whole)
    block = parts["blocks"][1]
    assert {name for name, weight in block.items() if isinstance(weight, Quantized)} == {name for name in block if name.startswith("w")}
    assert {weight.codes.dtype for weight in block.values() if isinstance(weight, Quantized)} == {jnp.dtype(kind)}
    assert parts["embed"].codes.dtype == parts["lm_head"].codes.dtype == jnp.int8
    assert block["wq"].codes.sharding.spec == PartitionSpec("tensor", "fsdp")
    assert block["wq"].scale.sharding.spec == PartitionSpec("tensor", None)  # three groups, which two devices do not divide, or one
    assert block["w_down"].scale.sharding.spec == PartitionSpec("fsdp", "tensor" if kind == "int4" else None)
    planned = programs.abstract_params(CONFIG, jnp.dtype("float32"), mesh, kind)
    jax.tree.map(lambda leaf, array: np.testing.assert_equal((leaf.shape, leaf.dtype), (array.shape, array.dtype)), planned, parts)
    assert jax.tree.all(jax.tree.map(lambda leaf, array: leaf.sharding == array.sharding, planned, parts))
    assert counts.bytes_of_a_chip(planned["blocks"][0]["wq"].codes) == 32 * 96 // 4 // (2 if kind == "int4" else 1)


def test_a_branch_of_a_quantised_target_is_made_of_its_numbers():
    params = load("int4")
    branch = exit_branch.init_exit_branch(CONFIG, params, 1, "next", np.array([3, 5, 8]))
    assert jax.tree.structure(branch.block) == jax.tree.structure(load("none")["blocks"][0])
    np.testing.assert_array_equal(branch.block["wq"], stored.to_dense(params["blocks"][1]["wq"], jnp.dtype("float32")))
    np.testing.assert_array_equal(branch.head, stored.to_dense(params["lm_head"], jnp.dtype("float32"))[np.array([3, 5, 8])])


def test_a_branch_of_the_target_as_it_is_is_warned_of(tmp_path):
    params = load("none")
    branch = exit_branch.init_exit_branch(CONFIG, params, 1, "next")
    info = branch_folder.describe(CONFIG, params, branch, exit_layer=1, start="next", calibration=(1.0, 0.0), training={})
    branch_folder.save_branch(tmp_path, branch, info)
    with pytest.warns(UserWarning, match="made for another model"):
        branch_folder.load_branch(str(tmp_path), CONFIG, load("int8"))
    fingerprints = {branch_folder.fingerprint(load(kind)) for kind in ("none", *KINDS)}
    assert len(fingerprints) == 3
    assert branch_folder.fingerprint(load("int4", sharding.make_mesh(fsdp=2, tensor=2))) in fingerprints


# Decoding -------------------------------------------------------------------------------------------------------------------------------


def make_engine(kind: str, mesh: jax.sharding.Mesh | None = None, *, coded: bool = True, dtype: str = "float32") -> Engine:
    """A quantised model with lookup and a branch behind its first block, which is right now and then."""
    params = load(kind, mesh, dtype)
    if coded and mesh is None:
        params = llama.with_codes(CONFIG, params, quantized_codes(CONFIG, params))
    branch = exit_branch.init_exit_branch(CONFIG, load(kind, None, dtype), 1, "zero")
    if mesh:
        branch = jax.tree.map(jax.device_put, branch, exit_branch.exit_branch_shardings(CONFIG, CONFIG.vocab_size, mesh))
    draft = DraftConfig(1, 2, verify_widths=(), longest_match=LONGEST_MATCH)
    model = LoadedModel(CONFIG, params, tiny.tokenizer(), (), kind)
    return Engine(
        model, DecodeConfig(max_new_tokens=20, prompt_buckets=(16,), min_capacity=64), Drafter(branch, draft, Calibration(), False)
    )


def texts(engine: Engine, controller: Controller | None = None) -> list[list[int]]:
    found = engine.generate_ids(PROMPTS, seeds=[0, 1], controller=controller)
    assert controller is None or sum(int(generation.log.drafted.sum()) for generation in found) > 0
    return [generation.token_ids for generation in found]


@pytest.mark.slow  # every run has the command's comparison below
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_speculation_says_what_the_quantised_model_says(kind):
    """By the kernels of a CPU, by XLA, and on a mesh; and that is not what the model says as it is."""
    costs = RoundCosts(exit=(1.0, 1.0, 1.0), look_up=(1.0, 1.0, 1.0))  # not those of this machine, which depend on what else it does
    both = build_controller(parse_controller("cost_aware", 2), Setup(calibration=Calibration(), costs=costs, has_lookup=True))
    plain = texts(make_engine(kind))
    assert texts(make_engine(kind), both) == plain
    assert texts(make_engine(kind, coded=False), both) == plain
    many = make_engine(kind, sharding.make_mesh(data=2, tensor=2))
    assert many._row_shares == 2
    assert texts(many, both) == plain
    if kind == "int4":
        assert texts(make_engine("none", coded=False)) != plain


def test_refilled_rows_say_what_the_quantised_model_says():
    """As in self-generation."""
    engine = make_engine("int4", coded=False)
    requests = [Request(i, prompt, 0.0, 20) for i, prompt in enumerate(PROMPTS)]
    pacing = RefillConfig(prompt_buckets=(16,), cache_buckets=(32,), chunk=8)
    found = Refiller(engine, sharding.make_mesh(data=2), 2, config=pacing).run(requests, jax.random.key(0))
    assert {response.index: response.tokens.tolist() for response in found} == dict(enumerate(texts(engine)))


def test_16_bits_decode():
    engine = make_engine("int4", dtype="bfloat16", coded=False)
    assert engine.prefill(PROMPTS, [0, 1], 2, 4).cache.k[0].dtype == jnp.bfloat16
    assert [len(text) for text in texts(engine)] == [20, 20]


def test_a_file_that_is_quantised_already_is_quantised_anew(tmp_path):
    file = tiny.write_gguf(tmp_path / "model.gguf", tiny.hf_config(), matrix_type=tiny.gguf.GGMLQuantizationType.Q8_0)
    engine = eesd_jax.load(str(file), dtype="float32", exit_branch="none", arms=["lookup"], quantize="int4")
    dense = eesd_jax.load(str(file), dtype="float32", exit_branch="none", arms=["lookup"])
    weight, read = engine.model.params["blocks"][0]["wq"], dense.model.params["blocks"][0]["wq"]
    weight, read = stored.dense((weight, read))
    jax.tree.map(np.testing.assert_array_equal, weight, quantize(np.asarray(read), "int4"))
    assert stored.has_codes(engine.params) == bool(ops.pack_codes.kernels())


# What users see -------------------------------------------------------------------------------------------------------------------------


def test_the_command_compares_with_plain_decoding_of_the_quantised_model(tmp_path):
    folder = tiny.write_folder(tmp_path / "model", tiny.hf_config(), with_tokenizer=True)
    with generate_command.loaded(tmp_path / "cache") as command:
        flags = (f"--model={folder}", "--prompt=hello hello hello", "--arms=lookup", "--controller=fixed:2", "--max_new_tokens=12")
        result = command(*flags, "--compare", "--quantize=int4")
        assert result.code == 0, result.err
        assert "identical: yes" in result.out.splitlines()


def test_unknown_quantisations_are_named():
    for make in (lambda: ExperimentConfig(quantize="int3"), lambda: eesd_jax.load("tiny", quantize="int3")):
        with pytest.raises(UserError, match="quantize is 'int3'; expected one of none, int8, int4"):
            make()
    with commands.loaded("train/distill.py") as command:
        result = commands.run(command, "--config=configs/tiny.py", "--config.quantize=int3")
        assert_refused(result, "quantize is 'int3'", "expected one of none, int8, int4")
