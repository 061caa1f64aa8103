"""N-gram tables on disk: one safetensors file, which says in its metadata what text was counted."""

import os
import pathlib
import re
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from eesd_jax import files
from eesd_jax.decode.sources import ngrams
from eesd_jax.errors import UserError
from eesd_jax.weights.branch_folder import SHIPPED

NAME = "ngrams.safetensors"
_ENTRIES, _VOCAB = "entries", "vocab_size"


def shipped_ngrams(model: str) -> pathlib.Path | None:
    """The file that this package carries for a model of that name (`/` becomes `--`), or None."""
    file = SHIPPED / model.replace("/", "--") / NAME
    return file if file.exists() else None


def save_ngrams(path: str | os.PathLike, entries: np.ndarray, vocab_size: int, provenance: dict[str, str]) -> None:
    """Writes a table (`decode/sources/ngrams.py`: uint32 [E]) under a temporary name first.

    Raises:
      UserError: it cannot be written.
    """
    path = pathlib.Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.replaced(path) as partial:
            save_file({_ENTRIES: entries}, partial, metadata=provenance | {_VOCAB: str(vocab_size)})
    except OSError as error:
        raise UserError(f"cannot write {str(path)!r} ({error.strerror}); expected a file in a folder that can be written to") from None


class NgramFile(NamedTuple):
    """path: of the file. entries: uint32 [E], see `decode/sources/ngrams.py`. vocab_size: of the model whose text was counted."""

    path: str
    entries: np.ndarray
    vocab_size: int


def load_ngrams(path: str | os.PathLike) -> NgramFile:
    """Reads a table.

    Raises:
      UserError: there is no such file, or it is none of `save_ngrams`.
    """
    name = repr(str(path))
    if not pathlib.Path(path).is_file():
        raise UserError(f"n-gram table {name}: no such file; expected one that train/ngrams.py has written")
    try:
        with safe_open(path, "numpy") as file:
            counted, entries = (file.metadata() or {}).get(_VOCAB), file.get_tensor(_ENTRIES)
    except (SafetensorError, OSError) as error:
        raise UserError(f"n-gram table {name} cannot be read ({error}); expected a file that train/ngrams.py has written") from None
    if (
        not re.fullmatch("[0-9]{1,9}", counted or "")
        or entries.dtype != np.uint32
        or entries.ndim != 1
        or entries.size < 2
        or entries.size & (entries.size - 1)
    ):
        raise UserError(f"{name} is no n-gram table; expected a file that train/ngrams.py has written")
    if (largest := int((entries & ngrams.MAX_TOKEN).max())) >= int(counted):
        raise UserError(f"n-gram table {name} foretells token {largest}; expected 0 to {int(counted) - 1}, as it says of itself")
    return NgramFile(str(path), entries, int(counted))


def check_ngrams(table: NgramFile, vocab_size: int) -> None:
    """Raises UserError for a table of another vocabulary than that of the model whose text it is to foretell."""
    if table.vocab_size != vocab_size:
        raise UserError(
            f"n-gram table {table.path!r} is of text in {table.vocab_size} tokens, and the model has {vocab_size}; "
            "expected one that train/ngrams.py has written for this model"
        )
