"""Where several files of a folder could be meant, one rule chooses, says what it left aside, or refuses in one line."""

import json
import pathlib
import re
import warnings

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

from eesd_jax.errors import UserError
from eesd_jax.weights import hub, known
from eesd_jax.weights.gguf import GGUFSource
from eesd_jax.weights.load import load_model
from eesd_jax.weights.safetensors import SafetensorsSource

HF = tiny.hf_config()
INDEX = "model.safetensors.index.json"
EMBED = "model.embed_tokens.weight"


def values(folder: pathlib.Path) -> dict[str, np.ndarray]:
    source = SafetensorsSource(folder)
    return {name: source.read(name)[tuple(slice(None) for _ in shape)] for name, shape in source.shapes.items()}


def assert_seed(found: dict[str, np.ndarray], seed: int) -> None:
    jax.tree.map(np.testing.assert_array_equal, found, tiny.tensors(tiny.config(), seed))


def error_of(name: pathlib.Path) -> str:
    with pytest.raises(UserError) as caught:
        load_model(str(name), jnp.dtype("float32"))
    message = str(caught.value)
    assert "\n" not in message
    assert str(name) in message or str(name.parent) in message
    return message


# Folders of safetensors --------------------------------------------------------------------------------------------------------------


def test_one_file_comes_before_an_index_of_shards(tmp_path):
    tiny.write_folder(tmp_path, HF, seed=1, shards=3)
    tiny.write_folder(tmp_path, HF, seed=2)
    with pytest.warns(UserWarning, match=rf"read from model\.safetensors; ignored: {re.escape(INDEX)}, model-00001-of-00003.safetensors, "):
        assert_seed(values(tmp_path), 2)


def test_the_index_says_which_of_two_sets_of_shards(tmp_path):
    tiny.write_folder(tmp_path, HF, seed=1, shards=2)
    tiny.write_folder(tmp_path, HF, seed=2, shards=3)
    with pytest.warns(
        UserWarning, match=r"read from model-00001-of-00003.safetensors and 2 more; ignored: model-00001-of-00002.safetensors"
    ):
        assert_seed(values(tmp_path), 2)


def test_the_index_says_which_of_two_copies_of_a_tensor(tmp_path):
    tiny.write_folder(tmp_path, HF, seed=1, shards=2)
    shards = sorted(tmp_path.glob("model-*"))
    weight_map = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    other = next(shard for shard in shards if shard.name != weight_map[EMBED])
    save_file(load_file(other) | {EMBED: np.zeros((3, 3), np.float32)}, other)
    assert_seed(values(tmp_path), 1)
    del weight_map[EMBED]
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match=f"tensor {EMBED} is in model-00001-of-00002.safetensors and in model-00002"):
        SafetensorsSource(tmp_path)


def test_a_complete_set_of_shards_needs_no_index(tmp_path):
    tiny.write_folder(tmp_path, HF, seed=1, shards=3)
    (tmp_path / INDEX).unlink()
    assert_seed(values(tmp_path), 1)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    assert f"2 safetensors files (model-00001-of-00003.safetensors, model-00003-of-00003.safetensors, ...) but no {INDEX}" in error_of(
        tmp_path
    )


def test_files_of_other_kinds_beside_a_model_are_no_weights(tmp_path):
    tiny.write_folder(tmp_path, HF, seed=1)
    (tmp_path / "model.safetensors").rename(tmp_path / "weights.safetensors")
    for name in ("adapter_model", "consolidated", "exit_branch", "ngrams"):
        save_file({"x": np.zeros(1)}, tmp_path / f"{name}.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_seed(values(tmp_path), 1)


def test_an_adapter_beside_a_model_is_said_not_to_be_applied(tmp_path):
    tiny.write_folder(tmp_path, HF, seed=1)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.warns(UserWarning, match=r"ignored: adapter_config.json \(an adapter, which is not applied\)"):
        assert_seed(values(tmp_path), 1)


@pytest.mark.parametrize("with_config", [True, False])
@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"])
def test_an_adapter_alone_is_no_model(tmp_path, file, with_config):
    tiny.write_folder(tmp_path, HF, with_tokenizer=True)
    (tmp_path / "model.safetensors").rename(tmp_path / file)
    if file.endswith(".json"):
        (tmp_path / file).write_text(json.dumps({"base_model_name_or_path": "me/base"}))
    if not with_config:
        (tmp_path / "config.json").unlink()
    message = error_of(tmp_path)
    assert f"holds an adapter ({file}" in message
    assert "expected the folder of a model, an adapter merged into it" in message
    assert ("of 'me/base'" in message) == file.endswith(".json")
    if not with_config:
        with pytest.raises(UserError, match="holds an adapter"):
            known.find_config(str(tmp_path))


@pytest.mark.parametrize("named", ["../other.safetensors", "/etc/hosts", "", 3, None, ["a"]])
def test_an_index_names_files_of_its_folder(tmp_path, named):
    tiny.write_folder(tmp_path / "model", HF, shards=2, with_tokenizer=True)
    save_file({EMBED: np.zeros((3, 3), np.float32)}, tmp_path / "other.safetensors")
    index = json.loads((tmp_path / "model" / INDEX).read_text())
    index["weight_map"][EMBED] = named
    (tmp_path / "model" / INDEX).write_text(json.dumps(index))
    message = error_of(tmp_path / "model")
    assert f"{EMBED} is to be in {named!r}; expected the name of a file in this folder" in message


def test_generation_config_adds_to_what_ends_a_text(tmp_path):
    tiny.write_folder(tmp_path, HF | {"eos_token_id": 5}, with_tokenizer=True)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 7}')
    assert {5, 7} <= set(load_model(str(tmp_path), jnp.dtype("float32")).eos_ids)


# GGUF files --------------------------------------------------------------------------------------------------------------------------


def test_a_folder_with_one_gguf_file(tmp_path, monkeypatch):
    file = tiny.write_gguf(tmp_path / "model.Q8_0.gguf", HF)
    tiny.write_gguf(tmp_path / "mmproj-model.gguf", HF)
    assert hub.find_model(str(tmp_path)) == file
    monkeypatch.chdir(tmp_path.parent)
    assert known.find_config(tmp_path.name).hidden_size == 32


def test_a_folder_with_two_gguf_files(tmp_path):
    for name in ("model.Q4_0.gguf", "model.Q8_0.gguf"):
        tiny.write_gguf(tmp_path / name, HF)
    assert "2 GGUF files in this folder (model.Q4_0.gguf, model.Q8_0.gguf); expected the path of one of them" in error_of(tmp_path)


def test_gguf_beside_safetensors_is_left_aside(tmp_path):
    tiny.write_folder(tmp_path, HF, seed=1)
    tiny.write_gguf(tmp_path / "model.gguf", HF, seed=2)
    assert hub.find_model(str(tmp_path)) == tmp_path
    with pytest.warns(UserWarning, match=r"read from model\.safetensors; ignored: model\.gguf"):
        assert_seed(values(tmp_path), 1)


@pytest.mark.parametrize("name", ["model.GGUF", "sha256-0123abcd"])
def test_a_gguf_file_under_another_name(tmp_path, name):
    file = tiny.write_gguf(tmp_path / name, HF)
    assert hub.find_model(str(file)) == file
    assert load_model(str(file), jnp.dtype("float32")).config == load_model(str(tiny.write_gguf(tmp_path / "a.gguf", HF)), "float32").config


def write_split(folder: pathlib.Path, parts: int = 3, stem: str = "model", **changes) -> list[pathlib.Path]:
    """Splits a file as `llama-gguf-split` does: metadata in the first part, a few tensors in each."""
    whole = gguf.GGUFReader(tiny.write_gguf(folder / "whole", HF))
    files = [folder / f"{stem}-{i + 1:05d}-of-{parts:05d}.gguf" for i in range(parts)]
    for part, file in enumerate(files):
        writer = gguf.GGUFWriter(file, "llama")
        if part == 0:
            for field in whole.fields.values():
                if not field.name.startswith("GGUF.") and field.name != "general.architecture":
                    tiny.add_field(writer, field.name, field.contents())
        about = {"split.no": part, "split.count": parts, "split.tensors.count": len(whole.tensors)}
        for name, value in (about | {name: value for name, value in changes.items() if part}).items():
            tiny.add_field(writer, name, value)
        for tensor in whole.tensors[part::parts]:
            writer.add_tensor(tensor.name, np.array(tensor.data))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    (folder / "whole").rename(folder / "whole.data")
    return files


@pytest.mark.parametrize("given", [0, 2, None], ids=["first", "last", "folder"])
def test_all_parts_of_a_split_file_are_read(tmp_path, given):
    files = write_split(tmp_path)
    model = load_model(str(tmp_path if given is None else files[given]), jnp.dtype("float32"))
    jax.tree.map(np.testing.assert_array_equal, model.params, tiny.params(tiny.config()))
    assert model.tokenizer.eos_token_id == tiny.tokenizer().eos_token_id


def test_parts_that_do_not_belong_together(tmp_path):
    files = write_split(tmp_path)
    renamed = tmp_path / "part.gguf"
    renamed.write_bytes(files[0].read_bytes())
    assert "part 1 of 3 of a split GGUF; expected its parts beside each other" in error_of(renamed)
    swapped = files[1].read_bytes()
    files[1].write_bytes(files[2].read_bytes())
    message = error_of(files[0])
    assert files[1].name in message
    assert "says that it is part 2 of 3 (counted from 0); expected 1 of 3" in message
    files[1].write_bytes(swapped[:-10])
    assert "truncated" in error_of(files[0])
    files[1].unlink()
    assert f"{files[1].name}: part is missing; expected all 3 parts" in error_of(files[0])


def test_parts_without_all_tensors(tmp_path):
    files = write_split(tmp_path)
    (tmp_path / "other").mkdir()
    tensors = gguf.GGUFReader(write_split(tmp_path / "other")[2]).tensors
    writer = gguf.GGUFWriter(files[2], "llama")
    for name, value in {"split.no": 2, "split.count": 3}.items():
        tiny.add_field(writer, name, value)
    for tensor in tensors[:-1]:
        writer.add_tensor(tensor.name, np.array(tensor.data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert "its parts have 29 tensors; expected 30" in error_of(files[0])


@pytest.mark.parametrize("count", [0, 1])
def test_a_file_that_was_merged_is_one(tmp_path, count):
    file = tiny.write_gguf(tmp_path / "model.gguf", HF, fields={"split.count": count, "split.no": 0})
    assert GGUFSource(file).shapes
