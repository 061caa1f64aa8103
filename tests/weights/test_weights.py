"""Weights and configurations arrive unchanged from every kind of file, one tensor at a time, on whatever mesh."""

import functools
import json
import math
import os
import pathlib
import socket
import subprocess
import sys
import weakref

import commands
import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import surroundings
import tiny
from gguf import GGMLQuantizationType as GGMLType

from eesd_jax.distill.examples import Example, check_example
from eesd_jax.errors import UserError
from eesd_jax.model import llama, rope, sharding, stored
from eesd_jax.model.config import ModelConfig
from eesd_jax.weights.gguf import GGUFSource
from eesd_jax.weights.load import load_model, load_params
from eesd_jax.weights.safetensors import SafetensorsSource, StoredTensor

# GGUF keeps it as a float32; a power of two is the same number there.
EPS = 2.0**-17
FAMILIES = {
    "llama": ("llama", {}),
    "llama-tied-biases": ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": ("llama", {"head_dim": 16, "num_key_value_heads": 4}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 16}),
}


def load(path: pathlib.Path, dtype: str = "float32"):
    return load_model(str(path), jnp.dtype(dtype))


def assert_equal(params: llama.Params, expected: llama.Params) -> None:
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def logits(config: ModelConfig, params: llama.Params) -> np.ndarray:
    tokens = jnp.arange(12)[None]
    x, _ = llama.forward_blocks(
        config, params["blocks"], llama.embed(params, tokens), jnp.zeros(1, jnp.int32), None, range(config.num_layers)
    )
    return np.asarray(llama.logits(config, params, x))


@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_folder_round_trip(tmp_path, dtype, shards):
    tiny.write_folder(tmp_path, tiny.hf_config(), dtype=dtype, shards=shards, with_tokenizer=True)
    model = load(tmp_path)
    assert model.config == tiny.config()
    assert_equal(model.params, jax.tree.map(lambda x: x.astype(dtype).astype("float32"), tiny.params(tiny.config())))
    assert {x.dtype for x in jax.tree.leaves(load(tmp_path, "bfloat16").params)} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize("family", FAMILIES)
def test_gguf_equals_folder(tmp_path, family):
    model_type, overrides = FAMILIES[family]
    hf = tiny.hf_config(model_type, rms_norm_eps=EPS, **overrides)
    from_folder = load(tiny.write_folder(tmp_path / "folder", hf, with_tokenizer=True))
    from_gguf = load(tiny.write_gguf(tmp_path / "model.gguf", hf))
    assert from_gguf.config == from_folder.config
    assert_equal(from_gguf.params, from_folder.params)
    assert from_gguf.eos_ids == from_folder.eos_ids == (0, tiny.tokenizer().eos_token_id)
    np.testing.assert_array_equal(logits(*from_gguf[:2]), logits(*from_folder[:2]))


def test_mistral_is_a_llama_in_gguf(tmp_path):
    model = load(tiny.write_gguf(tmp_path / "model.gguf", tiny.hf_config("mistral")))
    assert model.config.architecture == "llama"
    assert_equal(model.params, tiny.params(tiny.config("mistral")))


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "MXFP4"])
def test_quantized_gguf_equals_its_dequantized_tensors(tmp_path, kind):
    kind, hf = GGMLType[kind], tiny.hf_config()
    source = GGUFSource(tiny.write_gguf(tmp_path / "model.gguf", hf, matrix_type=kind))
    for name, value in tiny.tensors(tiny.config()).items():
        expected = gguf.dequantize(gguf.quantize(value, kind), kind) if value.ndim == 2 else value
        np.testing.assert_array_equal(source.read(name), expected, err_msg=name)


def test_dequantized_file_holds_the_same_weights(tmp_path):
    quantized = tiny.write_gguf(tmp_path / "model.gguf", tiny.hf_config(), matrix_type=GGMLType.Q4_1)
    command = [sys.executable, "benchmarks/dequantized.py", f"--model={quantized}"]
    run = functools.partial(subprocess.run, cwd=commands.ROOT, capture_output=True, text=True, timeout=300)
    result = run([*command, f"--output={tmp_path / 'float32.gguf'}"])
    assert result.returncode == 0, result.stderr
    ours, theirs = load(tmp_path / "float32.gguf"), load(quantized)
    assert ours.config == theirs.config
    assert not stored.has_codes(ours.params)
    assert_equal(ours.params, stored.dense(theirs.params))
    failed = run([*command, f"--output={tmp_path / 'nowhere' / 'float32.gguf'}"])
    assert failed.returncode == 2
    assert "expected a file in a folder that can be written to" in failed.stderr


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"])
def test_types_that_only_dequantize(tmp_path, kind):
    kind = GGMLType[kind]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    # Any bytes below 0x70 are finite numbers.
    raw = np.random.default_rng(0).integers(0, 0x70, (8, 512 // block * size), dtype=np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tensor("blk.0.ffn_down.weight", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    source = GGUFSource(tmp_path / "model.gguf")
    assert source.shapes == {"model.layers.0.mlp.down_proj.weight": (8, 512)}
    np.testing.assert_array_equal(source.read("model.layers.0.mlp.down_proj.weight"), gguf.dequantize(raw, kind))


def test_rope_divisors_of_gguf_equal_llama3_scaling(tmp_path):
    theta, factor, low, high, original = 1000.0, 8.0, 1.0, 4.0, 64
    scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high}
    hf = tiny.hf_config(rope_theta=theta, rope_scaling=scaling | {"original_max_position_embeddings": original})

    def divisor(pair: int) -> float:
        wavelength = 2 * math.pi * theta ** (2 * pair / hf["head_dim"])
        if wavelength < original / high:
            return 1.0
        if wavelength > original / low:
            return factor
        smooth = (original / wavelength - low) / (high - low)
        return 1 / ((1 - smooth) / factor + smooth)

    divisors = np.array([divisor(pair) for pair in range(hf["head_dim"] // 2)])
    file = tiny.write_gguf(tmp_path / "model.gguf", hf, extra_tensors={"rope_freqs.weight": divisors})
    frequencies, expected = (rope.inverse_frequencies(c.rope, c.head_dim) for c in (load(file).config, ModelConfig.from_hf(hf, "tiny")))
    np.testing.assert_allclose(frequencies, expected, rtol=1e-6)
    assert len(set(divisors)) == 3, "pairs of all three kinds"


@pytest.mark.parametrize(
    ("fields", "scaling"),
    [
        ({"type": "none"}, None),
        ({"type": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        (
            {"type": "yarn", "factor": 4.0, "original_context_length": 128},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        ),
        (
            {"type": "yarn", "factor": 4.0, "original_context_length": 32, "yarn_beta_fast": 16.0, "yarn_attn_factor": 0.5},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 16.0, "attention_factor": 0.5},
        ),
    ],
)
def test_rope_scaling_of_gguf(tmp_path, fields, scaling):
    hf = tiny.hf_config("qwen2")
    file = tiny.write_gguf(tmp_path / "model.gguf", hf, fields={f"qwen2.rope.scaling.{name}": value for name, value in fields.items()})
    config, expected = load(file).config, ModelConfig.from_hf(hf | {"rope_scaling": scaling}, "tiny")
    assert (config.rope, config.context_length) == (expected.rope, expected.context_length)


def test_linear_scaling_as_the_first_gguf_files_spell_it(tmp_path):
    file = tiny.write_gguf(tmp_path / "model.gguf", tiny.hf_config(), fields={"llama.rope.scale_linear": 4.0})
    expected = tiny.config(rope_scaling={"rope_type": "linear", "factor": 4.0})
    assert (load(file).config.rope, load(file).config.context_length) == (expected.rope, 4 * 128)


def test_end_tokens_come_from_every_file_that_names_some(tmp_path):
    folder = tiny.write_folder(tmp_path / "folder", tiny.hf_config(eos_token_id=5), with_tokenizer=True)
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 5]}')
    assert load(folder).eos_ids == (0, tiny.tokenizer().eos_token_id, 5, 7)
    ids = {"eos": 4, "eot": 6, "eom": 2**32 - 1}  # as files spell "none"
    file = tiny.write_gguf(
        tmp_path / "model.gguf", tiny.hf_config(), fields={f"tokenizer.ggml.{name}_token_id": value for name, value in ids.items()}
    )
    assert load(file).eos_ids == (0, 2, 4, 6)


@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_a_tokenizer_may_have_more_tokens_than_the_model(tmp_path, kind):
    """An unused pad token, as WizardLM's; and an end token that the model cannot write is none."""
    count = len(tiny.tokenizer())
    hf = tiny.hf_config(vocab_size=count - 1, eos_token_id=[1, count - 1, -1])
    if kind == "folder":
        model = load(tiny.write_folder(tmp_path, hf, with_tokenizer=True))
    else:
        ids = {"eos": 1, "eot": count - 1}
        fields = {f"tokenizer.ggml.{name}_token_id": value for name, value in ids.items()}
        model = load(tiny.write_gguf(tmp_path / "model.gguf", hf, fields=fields))
    assert (len(model.tokenizer), model.config.vocab_size) == (count, count - 1)
    assert 1 in model.eos_ids
    assert not {-1, count - 1} & set(model.eos_ids)
    with pytest.raises(
        UserError, match=rf"dataset 'text', example 0: token id {count - 1} is outside the vocabulary; expected 0 to {count - 2}"
    ):
        check_example(Example(np.array([3, count - 1]), np.array([False, True])), "text", 0, model)


@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_loading_holds_one_tensor_at_a_time(tmp_path, kind):
    hf = tiny.hf_config(num_hidden_layers=6)
    source = (
        SafetensorsSource(tiny.write_folder(tmp_path, hf, shards=2))
        if kind == "folder"
        else GGUFSource(tiny.write_gguf(tmp_path / "model.gguf", hf, matrix_type=GGMLType.Q8_0))
    )
    alive, most = [], 0

    class Watched:
        description, shapes = source.description, source.shapes

        def read(self, name: str) -> "WatchedTensor":
            return WatchedTensor(source.read(name))

    class WatchedTensor:
        def __init__(self, tensor):
            self._tensor = tensor

        def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
            nonlocal most
            data = self._tensor[index]
            alive.append(weakref.ref(data))
            most = max(most, sum(ref() is not None for ref in alive))
            return data

    # In another dtype than the stored one: on the CPU an array that needs no conversion may itself become the param.
    load_params(ModelConfig.from_hf(hf, "tiny"), Watched(), jnp.dtype("bfloat16"))
    assert len(alive) == len(source.shapes)
    assert most == 1


PROCESS = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
folder, address, index = sys.argv[1:]
jax.distributed.initialize(address, 2, int(index))
from eesd_jax.model import sharding
from eesd_jax.weights import safetensors
from eesd_jax.weights.load import load_model

read = []
def watch(tensor, index, get=safetensors.StoredTensor.__getitem__):
    read.append(get(tensor, index).nbytes)
    return get(tensor, index)
safetensors.StoredTensor.__getitem__ = watch
params = load_model(folder, jnp.dtype("bfloat16"), sharding.make_mesh(fsdp=2, tensor=2)).params
held = [{str(shard.index): shard.data.nbytes for shard in leaf.addressable_shards} for leaf in jax.tree.leaves(params)]
whole = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
print(json.dumps({"read": sum(read), "held": sum(sum(parts.values()) for parts in held), "whole": whole}))
"""


@pytest.mark.slow
def test_each_process_reads_what_its_devices_hold(tmp_path):
    tiny.write_folder(tmp_path, tiny.hf_config(), dtype="bfloat16", shards=2, with_tokenizer=True)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": surroundings.xla_flags(2)}
    processes = [
        subprocess.Popen([sys.executable, "-c", PROCESS, tmp_path, address, str(i)], stdout=subprocess.PIPE, text=True, env=environment)
        for i in range(2)
    ]
    for process in processes:
        out, _ = process.communicate(timeout=200)
        assert process.returncode == 0
        found = json.loads(out.splitlines()[-1])
        assert found["read"] == found["held"]
        assert found["held"] == found["whole"] / 2  # rows of fsdp, each on the two devices of one process


@pytest.mark.parametrize("sizes", [{"fsdp": 4}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_a_process_reads_whole_rows_and_no_more_than_its_share(tmp_path, sizes, monkeypatch):
    """Each of four in turn, as `benchmarks/loading.py` has them: of columns it would read nearly every page of the file."""
    asked, get = [], StoredTensor.__getitem__

    def watch(tensor: StoredTensor, index: tuple[slice, ...]) -> np.ndarray:
        values = get(tensor, index)
        asked.append((index, values.shape))
        return values

    monkeypatch.setattr(StoredTensor, "__getitem__", watch)
    with commands.loaded("benchmarks/loading.py") as loading:
        loading.write_sparse(tmp_path, tiny.hf_config())
        found = [loading.load_as(process, 4, tmp_path, sizes)[0] for process in range(4)]
    for index, shape in asked:
        assert all((part.start or 0, part.stop or size) == (0, size) for part, size in zip(index[1:], shape[1:], strict=True))
    tensors = SafetensorsSource(tmp_path).shapes
    whole = sum(2 * math.prod(shape) for shape in tensors.values())
    if "data" not in sizes:
        assert [(loaded.read, loaded.share) for loaded in found] == [(whole / 4, whole / 4)] * 4
    else:  # two devices a process, of which both hold the norms; and two processes hold the same
        norms = sum(2 * math.prod(shape) for shape in tensors.values() if len(shape) == 1)
        assert [loaded.read for loaded in found] == [(whole - norms) / 2 + norms / 2] * 4
        assert [loaded.share for loaded in found] == [(whole - norms) / 2 + norms] * 4


def test_params_on_a_mesh(tmp_path):
    config = tiny.config("qwen2", vocab_size=tiny.VOCAB_SIZE + 1)  # a vocabulary that no axis divides
    whole = tiny.params(config)
    mesh = sharding.make_mesh(jax.devices("cpu"), data=2, fsdp=2, tensor=2)
    params = load_params(config, tiny.ArraySource(tiny.tensors(config)), jnp.dtype("float32"), mesh)
    assert_equal(params, whole)
    halves = {"wq": (2, 2), "bq": (2,), "wo": (2, 2), "w_down": (2, 2), "attn_norm": (2,)}
    for name, parts in halves.items():
        weight = params["blocks"][1][name]
        assert len(weight.addressable_shards) == 8
        for shard in weight.addressable_shards:
            assert shard.data.shape == tuple(n // k for n, k in zip(weight.shape, parts, strict=True)), name
            np.testing.assert_array_equal(shard.data, np.asarray(whole["blocks"][1][name])[shard.index])
    assert params["embed"].addressable_shards[0].data.shape == (config.vocab_size, config.hidden_size // 2)
    np.testing.assert_allclose(logits(config, params), logits(config, whole), rtol=1e-4, atol=1e-5)
