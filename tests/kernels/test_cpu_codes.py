"""The CPU kernels that multiply by a file's codes: the bits of the float32 matrix, for every kind, shape and number of rows.

As integers: `test_cpu_integers.py`.
"""

import coded
import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from gguf import GGMLQuantizationType as GGMLType

from eesd_jax.kernels.cpu import codes as cpu_codes
from eesd_jax.kernels.cpu import integers
from eesd_jax.kernels.cpu import rows as cpu_rows
from eesd_jax.model import stored
from eesd_jax.model.exit_branch import with_codes
from eesd_jax.model.stored import Codes, Stored
from eesd_jax.weights.gguf import GGUFSource
from eesd_jax.weights.load import load_model

pytestmark = pytest.mark.skipif(jax.default_backend() != "cpu", reason="a kernel for CPUs")

KINDS = ("nibbles", "bytes")


def multiply(x: jax.Array, weight: Codes | jax.Array) -> jax.Array:
    # A function of its own, so that nothing traced with other registers is used.
    function = cpu_codes.rows_by_codes if isinstance(weight, Codes) else cpu_rows.rows_by_matrix
    return jax.jit(lambda x, weight: function(x, weight))(x, weight)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("inputs", "outputs"), [(32, 4), (96, 12), (576, 192), (64, 1000)])
def test_gives_the_bits_of_the_matrix(registers, kind, inputs, outputs):
    codes, matrix = coded.weight_of(kind, outputs, inputs)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(19, inputs)), jnp.float32)
    for rows in (1, 2, 3, 4, 5, 8, 19):
        assert cpu_codes.usable(rows, codes)
        np.testing.assert_array_equal(multiply(x[:rows], codes), multiply(x[:rows], matrix))


@pytest.mark.parametrize("kind", KINDS)
def test_concatenated_codes_stand_for_the_concatenated_matrix(kind):
    parts = [coded.weight_of(kind, outputs, 64) for outputs in (8, 4, 4)]
    assert stored.same_kind([codes for codes, _ in parts])
    x = jnp.ones((2, 64))
    found = multiply(x, stored.concatenate([codes for codes, _ in parts]))
    np.testing.assert_array_equal(found, np.concatenate([multiply(x, matrix) for _, matrix in parts], axis=1))


def test_only_codes_of_a_kind_and_a_length_go_together():
    nibbles, narrow = coded.weight_of("nibbles", 4, 64)[0], coded.weight_of("bytes", 4, 32)[0]
    assert not stored.same_kind([nibbles, narrow])
    assert not stored.same_kind([nibbles, coded.weight_of("nibbles", 4, 96)[0]])


def test_other_sizes_are_left_to_others():
    codes, _ = coded.weight_of("bytes", 8, 64)
    assert not cpu_codes.usable(cpu_rows.MAX_ROWS + 1, codes)
    assert not cpu_codes.usable(1, jax.tree.map(lambda array: array[:6], codes))


def test_rounding_to_8_bits_comes_near_and_is_done_once():
    weight = jax.random.normal(jax.random.key(0), (6, 96)) * jnp.array([1e-3, 1.0, 1e3, 0.0, 1e-9, 1.0])[:, None]
    codes = stored.rounded(weight)
    found = stored.numbers(codes)
    greatest = jnp.max(jnp.abs(weight.reshape(6, 3, 32)), axis=-1)
    off = jnp.max(jnp.abs(found - weight).reshape(6, 3, 32), axis=-1)
    assert bool(jnp.all(off[:4] <= greatest[:4] * 0.51 / 127))
    np.testing.assert_array_equal(found[3:5], 0)  # what is smaller than any scale
    again = stored.of_bytes(found)
    jax.tree.map(np.testing.assert_array_equal, again, codes)
    assert stored.of_bytes(weight) is None
    assert stored.rounded(weight[:, :48]) is None


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
    """A model of a file of codes, reading the codes, and reading the float32 weights."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(integers, "kernel", lambda: None)
        return coded.engines(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("controller", [None, "fixed:3"])
def test_texts_are_the_same(engines, controller):
    coded.check_texts_are_the_same(*engines, controller)


def test_programs_read_codes_alone_where_rows_are_few(engines):
    few, many = (coded.program(engines[0], rows) for rows in (2, cpu_rows.MAX_ROWS + 1))
    assert cpu_rows.TARGET not in few
    assert few.count(f"call @{cpu_codes.TARGET}") == 3 * 4 + 1  # a block's queries, keys and values in one, so too gate and up
    assert cpu_codes.TARGET not in many


def test_a_branch_that_needs_32_bits_keeps_them(engines):
    engine, _ = engines
    branch = engine.drafter.branch
    assert engine.branch.head.codes.codes.dtype == jnp.int8
    fine = with_codes(branch._replace(head=branch.head.at[0, 0].add(1e-4)))
    assert isinstance(fine.block["wq"], Stored) and not isinstance(fine.head, Stored)


def test_codes_are_not_kept_where_they_are_not_the_weights(tmp_path):
    file = tiny.write_gguf(tmp_path / "model.gguf", tiny.hf_config(), matrix_type=gguf.GGMLQuantizationType.Q8_0)
    assert stored.has_codes(load_model(str(file), jnp.dtype("float32")).params)
    assert not stored.has_codes(load_model(str(file), jnp.dtype("bfloat16")).params)
