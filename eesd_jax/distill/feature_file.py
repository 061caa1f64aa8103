"""Files of what the target's passes found while it wrote its text: training then needs no pass of its own over the text.

    OUTPUT_DIR/features/00000.bin         of process 0: a record for each token (see `record_type`), one text after the other
    OUTPUT_DIR/features/provenance.json   of which model and block, and how many of the most probable tokens
    OUTPUT_DIR/features/index.npy         int64 [N, 4]: of every response its process, its first record, how many, and a checksum of its
                                          text; written at the end

A text's records are written before the journal's line that vouches for them. Records after the last of those are cut off.

Axes: N responses, B rows, T tokens, D hidden, K kept tokens.
"""

import json
import os
import pathlib
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from eesd_jax import files
from eesd_jax.distill import loss
from eesd_jax.distill.data import Batch, Rows
from eesd_jax.distill.example import Example
from eesd_jax.distill.teacher import Features
from eesd_jax.engine.kept import Keep, Kept
from eesd_jax.errors import UserError

_ABOUT, _INDEX = "provenance.json", "index.npy"


def describe(keep: Keep, model: str, hidden_size: int, computed_in: str) -> dict[str, Any]:
    """Names what features depend on besides the text.

    Args:
      model: a hash of its weights.
      computed_in: the dtype of its activations.
    """
    return {
        "model": model,
        "exit_layer": keep.exit_layer,
        "top_tokens": keep.top_tokens,
        "dtype": keep.dtype,
        "hidden_size": hidden_size,
        "computed_in": computed_in,
    }


def record_type(about: dict[str, Any]) -> np.dtype:
    """Returns the dtype of a token's record: hidden and last, [D] each, ids, int32 [K], and log_probs, [K], as `Kept` has them."""
    floats, hidden, top = about["dtype"], (about["hidden_size"],), (about["top_tokens"],)
    return np.dtype([("hidden", floats, hidden), ("last", floats, hidden), ("ids", "<i4", top), ("log_probs", floats, top)])


class FeatureWriter:
    """Appends the records of texts to the file of one process.

    Args:
      folder: OUTPUT_DIR/features, on this machine.
      about: see `describe`.
      process: whose file it is.
      records: how many the journal vouches for; others are cut off.

    Raises:
      UserError: features of something else, or fewer records than there should be.
    """

    def __init__(self, folder: pathlib.Path, about: dict[str, Any], process: int, records: int):
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / _ABOUT
        if path.exists() and (found := _read_about(path)) != about:
            names = [name for name in about if found.get(name) != about[name]]
            raise UserError(f"{folder} holds features that differ in {', '.join(names)}; expected the same settings, or another output_dir")
        if not path.exists():
            files.write_whole(path, json.dumps(about, indent=1))
        self._type = record_type(about)
        self._path = folder / _name(process)
        size = records * self._type.itemsize
        if size > (self._path.stat().st_size if self._path.exists() else 0):
            raise UserError(f"{self._path} is shorter than the {size} bytes of its responses; expected another output_dir")
        if self._path.exists():
            os.truncate(self._path, size)
        self.records = records

    def append(self, kept: Kept) -> int:
        """Writes a text's records, and returns the place of the first."""
        records = np.zeros(len(kept.hidden), self._type)
        for name, values in kept._asdict().items():
            records[name] = values
        with open(self._path, "ab") as file:
            file.write(records.tobytes())
        self.records += len(records)
        return self.records - len(records)


def write_index(folder: pathlib.Path, places: Sequence[tuple[int, int, int]], texts: Sequence[np.ndarray]) -> None:
    """Writes where every response's records are.

    Args:
      places: of each its process, its first record, and how many.
      texts: of each the tokens of prompt and response, int32 [n].
    """
    index = [(*place, _checksum(text)) for place, text in zip(places, texts, strict=True)]
    with files.replaced(folder / _INDEX) as partial, open(partial, "wb") as file:
        np.save(file, np.array(index, np.int64))


def _checksum(text: np.ndarray) -> int:
    return zlib.crc32(text.astype("<i4").tobytes())


class FeatureReader:
    """Reads the features of a dataset that was written with them.

    Attributes:
      about: see `describe`.

    Raises:
      UserError: files that are damaged, or do not hold what their index says.
    """

    def __init__(self, folder: pathlib.Path):
        self._folder = folder
        try:
            self.about: dict[str, Any] = json.loads((folder / _ABOUT).read_text())
            self._index = np.load(folder / _INDEX, allow_pickle=False)
            kind = record_type(self.about)
            process, first, count, _ = self._index.T
            self._files = {int(p): np.memmap(folder / _name(int(p)), kind, "r") for p in np.unique(process)}
            ends = np.array([len(self._files[int(p)]) for p in process], np.int64)
            whole = self._index.dtype == np.int64 and (first >= 0).all() and (count >= 0).all() and (first <= ends - count).all()
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise self._damaged(" ".join(str(error).split())) from None
        if not whole:
            raise self._damaged("its index points beyond the end of a file")

    def _damaged(self, reason: str) -> UserError:
        return UserError(
            f"features {str(self._folder)!r} cannot be read ({reason}); expected those that train/self_generate.py has written: "
            "without the folder the target runs over the text once more"
        )

    def of_example(self, example: Example) -> np.ndarray:
        """Returns the records of a response of the dataset, [n - 1]: of all its tokens but the last."""
        if not 0 <= example.index < len(self._index):
            raise self._damaged(f"response {example.index} of the dataset is not among its {len(self._index)}")
        process, first, count, checksum = self._index[example.index].tolist()
        if count != len(example.tokens) - 1 or checksum != _checksum(example.tokens):
            raise self._damaged(f"they are of another text than response {example.index} of the dataset")
        return self._files[process][first : first + count]

    def of_batch(self, rows: Rows, batch: Batch) -> Features:
        """Returns what the target would compute of these rows (`Features`, in numpy), with 0 at tokens that no pass has run."""
        kind = record_type(self.about)
        records = np.zeros(batch.tokens.shape, kind)
        for i, row in enumerate(batch.row):
            start = 0
            for example in rows.members(int(row)):
                count = min(len(example.tokens), batch.tokens.shape[1])
                found = self.of_example(example)[:count]
                records[i, start : start + len(found)] = found
                start += count
        return Features(records["hidden"], records["last"], loss.TopTokens(records["ids"], records["log_probs"].astype(np.float32)))


def open_features(dataset: str) -> FeatureReader | None:
    """Opens the features that lie beside a dataset's folder; None where there are none."""
    home = pathlib.Path(dataset).expanduser()
    folder = home.parent / "features"
    return FeatureReader(folder) if home.is_dir() and (folder / _INDEX).exists() else None


def _read_about(path: pathlib.Path) -> dict[str, Any]:
    """Reads a file of provenance; {} where it is damaged."""
    try:
        found = json.loads(path.read_text())
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {}


def _name(process: int) -> str:
    return f"{process:05d}.bin"
