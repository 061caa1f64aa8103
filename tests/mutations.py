"""Valid files with one thing wrong, by number: the same number always gives the same file."""

import collections
import json
import math
import pathlib
import shutil
import time
import tracemalloc
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from eesd_jax.errors import UserError

_INTEGERS = (0, 1, 2, 7, 127, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1)
_VALUES = (
    None,
    True,
    -1,
    0,
    1,
    3,
    10**7,
    2**40,
    10**30,
    0.5,
    -2.5,
    1e308,
    math.nan,
    math.inf,
    "",
    "x",
    "</s>",
    "\ud800",
    [],
    {},
    [[]],
    {"": None},
)
_SECONDS = 20.0  # for one file, on a busy machine


class Reader(NamedTuple):
    """make: writes valid files into a folder. files: those that are changed. read: reads the folder.

    head: bytes of a file that say what is in it; most changes are made there.
    """

    make: Callable[[pathlib.Path], Any]
    files: tuple[str, ...]
    read: Callable[[pathlib.Path], Any]
    head: int = 2**62


def mutated(content: bytes, rng: np.random.Generator, head: int) -> bytes:
    """The bytes with one to three changes, most of them among the first `head`, where a file says what is in it."""
    data = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        size = max(1, min(head, len(data)) if rng.random() < 0.8 else len(data))
        place = int(rng.integers(size))
        match int(rng.integers(8)):
            case 0:
                data[place : place + 1] = bytes([data[place] ^ 1 << int(rng.integers(8))]) if data else b""
            case 1:
                data[place : place + 1] = bytes([int(rng.integers(256))])
            case 2 | 3:
                width = int(rng.choice([1, 2, 4, 8]))
                value = _INTEGERS[rng.integers(len(_INTEGERS))] % 256**width
                data[place : place + width] = value.to_bytes(width, "little")
            case 4:
                del data[place : place + int(rng.integers(1, 40))]
            case 5:
                data[place:place] = data[place : place + int(rng.integers(1, 40))]
            case 6:
                data[place:place] = rng.bytes(int(rng.integers(1, 20)))
            case 7:
                del data[place:]
    return bytes(data)


def mutated_json(content: bytes, rng: np.random.Generator) -> bytes:
    """A JSON file with one value replaced, taken away, or doubled under another name."""
    whole = [json.loads(content)]
    parent, key = whole, 0
    while isinstance(parent[key], (dict, list)) and parent[key] and rng.random() < 0.85:
        parent = parent[key]
        keys = list(parent) if isinstance(parent, dict) else range(len(parent))
        key = keys[rng.integers(len(keys))]
    match int(rng.integers(4)):
        case 0 if parent is not whole:
            del parent[key]
        case 1 if isinstance(parent, dict):
            parent[str(_VALUES[rng.integers(len(_VALUES))])] = parent[key]
        case 2 if isinstance(parent[key], int) and not isinstance(parent[key], bool):
            parent[key] += int(rng.choice([-1, 1, 1000]))
        case _:
            parent[key] = _VALUES[rng.integers(len(_VALUES))]
    return json.dumps(whole[0]).encode() if whole else b""


def mutate_file(path: pathlib.Path, number: int, head: int = 2**62) -> None:
    """Puts one of its mutations in place of a file; one of JSON in half of all cases stays JSON."""
    rng = np.random.default_rng(number)
    content = path.read_bytes()
    is_json = path.suffix == ".json" and rng.random() < 0.6
    path.write_bytes(mutated_json(content, rng) if is_json else mutated(content, rng, head))


def outcome(read: Callable[[], Any], allowed: int) -> str:
    """What reading comes to: `refused` in one line, or `read`; AssertionError for anything else, or for more than `allowed` bytes."""
    started = time.monotonic()
    tracemalloc.start()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read()
        found = "read"
    except UserError as error:
        assert "\n" not in str(error).strip(), f"several lines: {error}"
        assert len(str(error)) < 2000, f"{len(str(error))} characters: {str(error)[:300]}"
        found = "refused"
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak <= allowed, f"{peak} bytes were taken, {allowed} allowed"
    assert time.monotonic() - started < _SECONDS
    return found


def try_all(reader: Reader, folder: pathlib.Path, numbers: range) -> dict[str, int]:
    """Reads the mutations with those numbers, and counts what they come to; AssertionError where one comes to anything else."""
    good, bad = folder / "good", folder / "bad"
    good.mkdir()
    reader.make(good)
    size = sum(path.stat().st_size for path in good.rglob("*") if path.is_file())
    allowed = 60 * size + 2_000_000  # a Python object for each token, and what libraries hold
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reader.read(good)  # what is compiled and imported for it
    assert outcome(lambda: reader.read(good), allowed) == "read"
    found = collections.Counter()
    for number in numbers:
        shutil.rmtree(bad, ignore_errors=True)
        shutil.copytree(good, bad)
        file = bad / reader.files[number % len(reader.files)]
        mutate_file(file, number, reader.head)
        try:
            found[outcome(lambda: reader.read(bad), allowed)] += 1
        except BaseException as error:
            error.add_note(f"mutation {number}, of {file.name}")
            raise
    assert found["refused"] > len(numbers) / 20, f"mutations that change next to nothing: {dict(found)}"
    return found
