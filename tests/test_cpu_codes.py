"""The CPU kernel that multiplies by a file's codes: the bits of the float32 matrix, for every kind, shape and number of rows."""

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from gguf import GGMLQuantizationType as GGMLType

from eesd_jax.config import DecodeConfig, DraftConfig
from eesd_jax.decode.controllers import Calibration
from eesd_jax.engine import Drafter, Engine
from eesd_jax.model import cpu_calls, cpu_codes, cpu_rows, llama
from eesd_jax.model.cpu_codes import Codes
from eesd_jax.model.exit_branch import init_exit_branch, with_codes
from eesd_jax.weights.gguf import GGUFSource
from eesd_jax.weights.load import load_model

pytestmark = pytest.mark.skipif(jax.default_backend() != "cpu", reason="a kernel for CPUs")

KINDS = ("nibbles", "bytes", "halves")


def weight_of(kind: str, outputs: int, inputs: int) -> tuple[Codes, jax.Array]:
    """Codes, and the matrix that they stand for."""
    rng = np.random.default_rng(inputs)
    groups = (outputs, inputs // cpu_codes.GROUP)
    scale, offset = rng.normal(size=(2, *groups)).astype(np.float32)
    if kind == "nibbles":
        codes = rng.integers(0, 256, (outputs, inputs // 2), np.uint8)
        pairs = codes.reshape(*groups, -1)
        numbers = np.concatenate([pairs & 15, pairs >> 4], axis=-1) * scale[..., None] + offset[..., None]
    elif kind == "bytes":
        codes, offset = rng.integers(-128, 128, (outputs, inputs), np.int8), None
        numbers = codes.reshape(*groups, -1) * scale[..., None]
    else:
        codes, scale, offset = rng.normal(size=(outputs, inputs)).astype(np.float16), None, None
        numbers = codes
    stored = Codes(*(None if array is None else jnp.asarray(array) for array in (codes, scale, offset)))
    return stored, jnp.asarray(numbers.reshape(outputs, inputs), jnp.float32)


def multiply(x: jax.Array, weight: Codes | jax.Array) -> jax.Array:
    # A function of its own, so that nothing traced with other registers is used.
    function = cpu_codes.rows_by_codes if isinstance(weight, Codes) else cpu_rows.rows_by_matrix
    return jax.jit(lambda x, weight: function(x, weight))(x, weight)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("inputs", "outputs"), [(32, 4), (96, 12), (576, 192), (64, 1000)])
def test_gives_the_bits_of_the_matrix(registers, kind, inputs, outputs):
    codes, matrix = weight_of(kind, outputs, inputs)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(19, inputs)), jnp.float32)
    for rows in (1, 2, 3, 4, 5, 8, 19):
        assert cpu_codes.usable(rows, codes)
        np.testing.assert_array_equal(multiply(x[:rows], codes), multiply(x[:rows], matrix))


@pytest.mark.parametrize("kind", KINDS)
def test_concatenated_codes_stand_for_the_concatenated_matrix(kind):
    parts = [weight_of(kind, outputs, 64) for outputs in (8, 4, 4)]
    assert cpu_codes.same_kind([codes for codes, _ in parts])
    x = jnp.ones((2, 64))
    found = multiply(x, cpu_codes.concatenate([codes for codes, _ in parts]))
    np.testing.assert_array_equal(found, np.concatenate([multiply(x, matrix) for _, matrix in parts], axis=1))


def test_only_codes_of_a_kind_and_a_length_go_together():
    nibbles, (narrow, _), (halves, _) = weight_of("nibbles", 4, 64)[0], weight_of("bytes", 4, 32), weight_of("halves", 4, 32)
    assert not cpu_codes.same_kind([nibbles, narrow])
    assert not cpu_codes.same_kind([narrow, halves])
    assert not cpu_codes.same_kind([nibbles, weight_of("nibbles", 4, 96)[0]])


def test_other_sizes_are_left_to_others():
    codes, _ = weight_of("bytes", 8, 64)
    assert not cpu_codes.usable(cpu_rows.MAX_ROWS + 1, codes)
    assert not cpu_codes.usable(1, None)
    assert not cpu_codes.usable(1, jax.tree.map(lambda array: array[:6], codes))
    with cpu_calls.on_mesh(True):
        assert not cpu_codes.usable(1, codes)


def test_halves_are_those_of_weights_that_lose_nothing():
    exact = jnp.array([[1.5, -(2.0**-24)], [65504.0, 0.0]])
    found = cpu_codes.of_halves(exact)
    assert found.codes.dtype == jnp.float16
    np.testing.assert_array_equal(found.codes.astype(jnp.float32), exact)
    for other in (1 + 2.0**-11, 65520.0, 2.0**-25):
        assert cpu_codes.of_halves(exact.at[0, 0].set(other)) is None


@pytest.mark.parametrize("kind", [GGMLType.Q4_0, GGMLType.Q4_1, GGMLType.Q8_0, GGMLType.Q5_0, GGMLType.F32])
def test_codes_of_a_file_are_its_weights(tmp_path, kind):
    # Queries and keys of Llama lie in another order in the file.
    source = GGUFSource(tiny.write_gguf(tmp_path / "model.gguf", tiny.hf_config(), matrix_type=kind))
    for name, shape in source.shapes.items():
        codes = source.codes(name)
        assert (codes is not None) == (len(shape) == 2 and kind not in (GGMLType.Q5_0, GGMLType.F32))
        if codes is not None:
            codes, identity = jax.tree.map(jnp.asarray, codes), jnp.eye(shape[1])
            np.testing.assert_array_equal(multiply(identity, codes).T, source.read(name))


def test_codes_of_blocks_of_256(tmp_path):
    kind = GGMLType.Q4_K
    block, size = gguf.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(0).integers(0, 256, (8, 512 // block, size), np.uint8)
    raw[..., [1, 3]] &= 0x3B  # the upper bytes of the two float16 of a block: finite
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tensor("blk.0.ffn_down.weight", raw.reshape(8, -1), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    source = GGUFSource(tmp_path / "model.gguf")
    (name,) = source.shapes
    codes = jax.tree.map(jnp.asarray, source.codes(name))
    np.testing.assert_array_equal(multiply(jnp.eye(512)[:64], codes).T, source.read(name)[:, :64])
    np.testing.assert_array_equal(multiply(jnp.eye(512)[-64:], codes).T, source.read(name)[:, -64:])


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    """A model of a file of codes with an exit branch in 16 bits: reading the codes, and reading the float32 weights."""
    file = tiny.write_gguf(tmp_path_factory.mktemp("model") / "model.gguf", tiny.hf_config(), matrix_type=GGMLType.Q4_1)
    model = load_model(str(file), jnp.dtype("float32"))
    branch = init_exit_branch(model.config, model.params, 1, "next")
    branch = jax.tree.map(lambda leaf: leaf.astype(jnp.float16).astype(leaf.dtype) if leaf.ndim == 2 else leaf, branch)
    drafter = Drafter(branch, DraftConfig(1, max_draft=3), Calibration(), trained=True)
    coded, dense = (Engine(some, DecodeConfig(max_new_tokens=24), drafter) for some in (model, model._replace(codes=None)))
    dense.branch = branch
    return coded, dense


@pytest.mark.parametrize("controller", [None, "fixed:3"])
def test_texts_are_the_same(engines, controller):
    prompts = [[5, 9, 2], [7, 7, 8, 30, 4]]
    coded, dense = ([text.token_ids for text in engine.generate_ids(prompts, seeds=[0, 1], controller=controller)] for engine in engines)
    assert coded == dense


def test_programs_read_codes_alone_where_rows_are_few(engines):
    coded, _ = engines

    def program(rows: int) -> str:
        x = jnp.ones((1, rows, coded.model.config.hidden_size))

        def run(params: llama.Params, x: jax.Array) -> jax.Array:
            x, _ = llama.forward_blocks(coded.model.config, params["blocks"], x, jnp.zeros(1, jnp.int32), None, range(3))
            return llama.logits(coded.model.config, params, x)

        return jax.jit(run).lower(coded.params, x).as_text()

    few, many = program(2), program(cpu_rows.MAX_ROWS + 1)
    assert cpu_rows.TARGET not in few
    assert few.count(f"call @{cpu_codes.TARGET}") == 3 * 4 + 1  # a block's queries, keys and values in one, so too gate and up
    assert cpu_codes.TARGET not in many


def test_a_branch_that_needs_32_bits_keeps_them(engines):
    coded, _ = engines
    branch = coded.drafter.branch
    assert coded.branch.head_codes.codes.dtype == jnp.float16
    fine = with_codes(branch._replace(head=branch.head * 1.001))
    assert fine.head_codes is None


def test_codes_are_not_kept_where_they_are_not_the_weights(tmp_path):
    file = tiny.write_gguf(tmp_path / "model.gguf", tiny.hf_config(), matrix_type=gguf.GGMLQuantizationType.Q8_0)
    assert load_model(str(file), jnp.dtype("float32")).codes is not None
    assert load_model(str(file), jnp.dtype("bfloat16")).codes is None
