"""Reads the weights of a Hugging Face folder: one or many safetensors shards, tensor by tensor. Pickle files are never opened."""

import json
import pathlib
import re
import warnings
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from eesd_jax.errors import UserError

INDEX_NAME = "model.safetensors.index.json"
NUMBERED = re.compile(r"(?P<stem>.+)-(?P<part>\d{5})-of-(?P<parts>\d{5})")
_ADAPTER = "adapter_config.json"
# An adapter; the same weights once more in another layout (Mistral); what this project keeps beside a model.
_NO_MODEL = ("adapter_", "consolidated", "exit_branch", "ngrams")


def read_json(path: pathlib.Path) -> dict:
    """A JSON object from a file; UserError names the file and line where it is not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
        json.dumps(value, ensure_ascii=False).encode()  # fails for halves of characters, which JSON can carry
    except FileNotFoundError:
        raise UserError(f"{path.parent}: no {path.name} in this folder; expected a Hugging Face model folder") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:  # of bytes that are no text, too, and of numbers with thousands of digits
        raise UserError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


class SafetensorsSource:
    """The tensors of a model folder by name, read on demand; shapes are known without reading data.

    Warns (`UserWarning`) of weights in the folder that are not taken.

    Args:
      folder: see `_find_weights`.

    Raises:
      UserError: no weights, several that could be meant, a shard that is missing, truncated or corrupt.
    """

    def __init__(self, folder: pathlib.Path):
        self.description = str(folder)
        weights = _find_weights(folder)
        holders: dict[str, list[pathlib.Path]] = {}
        self._open_shards = {}
        for shard in weights.files:
            try:
                # The header is checked against the file's size here, so a truncated shard is found before anything is loaded.
                handle = safe_open(shard, framework="numpy")
            except (SafetensorError, OSError) as error:
                refuse_pointer(shard)
                raise UserError(f"{shard}: truncated or not a safetensors file ({error})") from None
            self._open_shards[shard] = handle
            for name in handle.keys():  # noqa: SIM118  no dictionary
                holders.setdefault(name, []).append(shard)
        self._shard_of = {name: _holder(name, shards, weights.named.get(name), folder) for name, shards in holders.items()}
        self.shapes = {name: tuple(self._open_shards[shard].get_slice(name).get_shape()) for name, shard in self._shard_of.items()}
        if ignored := _ignored(folder, weights.files):
            taken = weights.files[0].name + (f" and {len(weights.files) - 1} more" if len(weights.files) > 1 else "")
            warnings.warn(f"{folder}: weights are read from {taken}; ignored: {', '.join(ignored)}", stacklevel=2)

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


class _Weights(NamedTuple):
    """files: that hold a model's weights. named: the file that an index names for a tensor, by tensor."""

    files: list[pathlib.Path]
    named: dict[str, pathlib.Path]


def _find_weights(folder: pathlib.Path) -> _Weights:
    """Chooses among the files of a folder, in the order of transformers.

    `model.safetensors`; else the shards that `model.safetensors.index.json` names; else, where transformers gives up, the only file, or the
    only complete set of numbered shards.
    """
    single, index = folder / "model.safetensors", folder / INDEX_NAME
    if single.exists():
        return _Weights([single], {})
    if index.exists():
        named = _read_index(index)
        return _Weights(sorted(set(named.values())), named)
    found = candidates(folder)
    if not found:
        refuse_adapter(folder)
        pickles = [path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in sorted(folder.glob(pattern))]
        hint = f" ({pickles[0]} is a pickle file, which is never opened: convert it to safetensors)" if pickles else ""
        raise UserError(f"{folder}: no weights in this folder; expected model.safetensors or {INDEX_NAME}{hint}")
    if len(found) > 1:
        numbered = [NUMBERED.fullmatch(path.stem) for path in found]
        wanted = [
            f"{found[0].name[: -len('00001-of-00001.safetensors')]}{i:05d}-of-{len(found):05d}.safetensors"
            for i in range(1, len(found) + 1)
        ]
        if not all(numbered) or [path.name for path in found] != wanted:
            raise UserError(
                f"{folder}: {len(found)} safetensors files ({', '.join(path.name for path in found[:3])}, ...) but no {INDEX_NAME} "
                "that says which belong to the model"
            )
    return _Weights(found, {})


def candidates(folder: pathlib.Path) -> list[pathlib.Path]:
    """Weights under names of all kinds, but for those of other things that may lie beside a model."""
    return [path for path in sorted(folder.glob("*.safetensors")) if not path.name.startswith(_NO_MODEL)]


def _read_index(index: pathlib.Path) -> dict[str, pathlib.Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: no 'weight_map' that names the shards")
    for tensor, file in weight_map.items():
        # What an index from a stranger names must not lie outside of the folder.
        if not isinstance(file, str) or not file or pathlib.PurePath(file).is_absolute() or ".." in pathlib.PurePath(file).parts:
            raise UserError(f"{index}: {tensor} is to be in {file!r:.80}; expected the name of a file in this folder")
    named = {tensor: index.parent / file for tensor, file in weight_map.items()}
    for tensor, shard in named.items():
        if not shard.is_file():
            raise UserError(f"{shard}: shard is missing; {index.name} says that it holds {tensor} and others")
    return named


def _holder(name: str, shards: list[pathlib.Path], named: pathlib.Path | None, folder: pathlib.Path) -> pathlib.Path:
    """The shard of a tensor: the one that the index names, else the only one that has it."""
    if named in shards:
        return named
    if len(shards) > 1:
        raise UserError(
            f"{folder}: tensor {name} is in {shards[0].name} and in {shards[1].name}; expected an index that says which is meant"
        )
    return shards[0]


def _ignored(folder: pathlib.Path, files: list[pathlib.Path]) -> list[str]:
    """What else in the folder looks like weights of this model."""
    others = [path.name for path in [*candidates(folder), *sorted(folder.glob("*.gguf"))] if path not in files]
    index = [INDEX_NAME] if (folder / INDEX_NAME).exists() and files == [folder / "model.safetensors"] else []
    adapter = ["adapter_config.json (an adapter, which is not applied)"] if (folder / _ADAPTER).exists() else []
    return [*index, *others[:4], *(["..."] if len(others) > 4 else []), *adapter]


def refuse_adapter(folder: pathlib.Path) -> None:
    """Raises UserError where a folder holds an adapter (LoRA) in place of a model."""
    adapters = [_ADAPTER] if (folder / _ADAPTER).exists() else sorted(path.name for path in folder.glob("adapter_model*"))
    if adapters:
        base = read_json(folder / _ADAPTER).get("base_model_name_or_path") if adapters == [_ADAPTER] else None
        raise UserError(
            f"{folder}: holds an adapter ({adapters[0]}{f', of {base!r}' if base else ''}) and no model; "
            "expected the folder of a model, an adapter merged into it"
        )


def refuse_pointer(path: pathlib.Path) -> None:
    """Raises UserError for a file that only says where Git LFS keeps the real one."""
    try:
        with path.open("rb") as file:
            is_pointer = file.read(40).startswith(b"version https://git-lfs")
    except OSError:
        return
    if is_pointer:
        raise UserError(f"{path}: is a pointer of Git LFS, not the file itself; expected what `git lfs pull` puts in its place")


def read_config(folder: pathlib.Path) -> dict:
    """The `config.json` of a model folder."""
    if not (folder / "config.json").exists():
        refuse_adapter(folder)
    return read_json(folder / "config.json")
