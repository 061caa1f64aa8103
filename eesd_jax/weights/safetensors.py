"""Reads the weights of a Hugging Face folder: one or many safetensors shards, tensor by tensor. Pickle files are never opened."""

import json
import pathlib

import numpy as np
from safetensors import SafetensorError, safe_open

from eesd_jax.errors import UserError

INDEX_NAME = "model.safetensors.index.json"


def read_json(path: pathlib.Path) -> dict:
    """A JSON object from a file; UserError names the file and line where it is not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path.parent}: no {path.name} in this folder; expected a Hugging Face model folder") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


class SafetensorsSource:
    """The tensors of a model folder by name, read on demand; shapes are known without reading data.

    Args:
      folder: holds `model.safetensors`, or shards with `model.safetensors.index.json`, or any single `*.safetensors`.

    Raises:
      UserError: no weights, a shard named by the index that is missing, a truncated or corrupt shard.
    """

    def __init__(self, folder: pathlib.Path):
        self.description = str(folder)
        self._open_shards = {}
        self._shard_of = {}
        for shard in _shards(folder):
            try:
                # The header is checked against the file's size here, so a truncated shard is found before anything is loaded.
                handle = safe_open(shard, framework="numpy")
            except (SafetensorError, OSError) as error:
                raise UserError(f"{shard}: truncated or not a safetensors file ({error})") from None
            self._open_shards[shard] = handle
            self._shard_of.update(dict.fromkeys(handle.keys(), shard))
        self.shapes = {name: tuple(self._open_shards[shard].get_slice(name).get_shape()) for name, shard in self._shard_of.items()}

    def read(self, name: str) -> "StoredTensor":
        """One tensor, of which parts can be taken."""
        shard = self._shard_of[name]
        return StoredTensor(shard, self._open_shards[shard], name)


class StoredTensor:
    """A tensor of a file, of which only what is asked for is read: `tensor[4:8, :]`, in its stored dtype (float32, float16 or bfloat16)."""

    def __init__(self, shard: pathlib.Path, handle: safe_open, name: str):
        self._shard = shard
        self._name = name
        self._slice = handle.get_slice(name)
        dtype = self._slice.get_dtype()
        if dtype not in ("F64", "F32", "F16", "BF16"):
            raise UserError(f"{shard}: tensor {name} is stored as {dtype}; expected F32, F16 or BF16")

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        try:
            return self._slice[index]
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self._shard}: cannot read tensor {self._name} ({error})") from None


def _shards(folder: pathlib.Path) -> list[pathlib.Path]:
    index = folder / INDEX_NAME
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{index}: no 'weight_map' that names the shards")
        shards = [folder / name for name in sorted(set(weight_map.values()))]
        for shard in shards:
            if not shard.exists():
                first = next(name for name, file in weight_map.items() if file == shard.name)
                raise UserError(f"{shard}: shard is missing; {index.name} says that it holds {first} and others")
        return shards
    single = folder / "model.safetensors"
    found = [single] if single.exists() else sorted(folder.glob("*.safetensors"))
    if not found:
        pickles = [path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in sorted(folder.glob(pattern))]
        hint = f" ({pickles[0]} is a pickle file, which is never opened: convert it to safetensors)" if pickles else ""
        raise UserError(f"{folder}: no weights in this folder; expected model.safetensors or {INDEX_NAME}{hint}")
    if len(found) > 1:
        raise UserError(f"{folder}: {len(found)} safetensors files but no {INDEX_NAME} that says which belong to the model")
    return found
