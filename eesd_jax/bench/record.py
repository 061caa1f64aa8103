"""Keeps what a benchmark has measured: answers, costs of rounds, divergences of greedy answers; and the journal that holds them."""

import dataclasses
import json
import os
import pathlib
from typing import Any, NamedTuple

from eesd_jax.engine.generation import Rounds
from eesd_jax.errors import UserError

# Passes of different widths round differently; below this difference of logits, float32 cannot tell which token is the greater.
EXCUSED_GAP = 1e-3


@dataclasses.dataclass(frozen=True)
class Answer:
    """One prompt's answer under one controller; fields as in `Generation`."""

    id: str | int
    token_ids: list[int]
    text: str
    finish_reason: str
    log: Rounds


@dataclasses.dataclass(frozen=True)
class Run:
    """One turn of a batch of conversations under one controller.

    batch, turn: counted from 0. category: of all conversations in it. seconds: wall time of the whole batch. answers: one a row.
    """

    batch: int
    turn: int
    controller: str
    category: str
    seconds: float
    answers: list[Answer]

    @property
    def tokens(self) -> int:
        return sum(len(answer.token_ids) for answer in self.answers)

    def to_json(self) -> dict[str, Any]:
        return vars(self) | {"answers": [vars(answer) | {"log": answer.log.to_json()} for answer in self.answers]}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Run":
        answers = [Answer(**answer | {"log": Rounds.from_json(answer["log"])}) for answer in values["answers"]]
        return cls(**values | {"answers": answers})


@dataclasses.dataclass(frozen=True)
class Divergence:
    """The place where a greedy answer first differs from plain decoding's.

    Attributes:
      position: tokens that are the same.
      gap: plain decoding's top-2 logit gap after them.
      excused: float32 cannot tell the two tokens apart: both logits are within `EXCUSED_GAP` of the greatest.
    """

    controller: str
    category: str
    id: str | int
    turn: int
    position: int
    gap: float
    excused: bool


class Costs(NamedTuple):
    """Seconds. plain: of a plain step. rounds, look_up: of a round with 0, 1, ... max_draft drafts, of the exit branch and from lookup."""

    plain: float
    rounds: tuple[float, ...]
    look_up: tuple[float, ...] = ()


def _line(kind: str, value: Any) -> bytes:
    return json.dumps({kind: value}).encode() + b"\n"


class Journal:
    """Keeps what a benchmark has done so far: a file of one JSON object a line, each written when it is complete.

    Args:
      path: of the file, made if need be.
      settings: all that the results depend on; they must be those that the file was begun with.

    Raises:
      UserError: the file was begun with other settings, or cannot be used.
    """

    def __init__(self, path: pathlib.Path, settings: dict[str, Any]):
        self._path = path
        settings = json.loads(json.dumps(settings))  # tuples become lists, as in the file
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            content = path.read_bytes() if path.exists() else b""
            whole = content[: content.rfind(b"\n") + 1]  # a line that a kill cut off is no line
            self._entries = [self._parse(line, number) for number, line in enumerate(whole.splitlines(), start=1)]
            if self._entries:
                self._check(self._entries[0].get("settings"), settings)
            elif not _line("settings", settings).startswith(content):
                raise self._foreign()
            if whole != content:
                os.truncate(path, len(whole))
            if not self._entries:
                self.append("settings", settings)
        except OSError as error:
            raise UserError(f"cannot use {str(path)!r} ({error.strerror}); expected a folder that can be written to") from None

    @classmethod
    def read(cls, path: pathlib.Path) -> "Journal":
        """Opens the journal that a benchmark has written, with whatever settings.

        Raises:
          UserError: there is none, or the file is something else.
        """
        try:
            with open(path, "rb") as file:
                settings = json.loads(file.readline())["settings"]
        except OSError as error:
            raise UserError(f"cannot read {str(path)!r} ({error.strerror}); expected what infer/benchmark.py wrote") from None
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{str(path)!r} was not written by infer/benchmark.py; expected what it wrote") from None
        return cls(path, settings)

    def _parse(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        if not isinstance(entry, dict):
            raise self._foreign(f", line {number},")
        return entry

    def _foreign(self, where: str = "") -> UserError:
        return UserError(f"{str(self._path)!r}{where} was not written by this benchmark; expected another --output_dir")

    def _check(self, begun_with: Any, settings: dict[str, Any]) -> None:
        if not isinstance(begun_with, dict):
            raise self._foreign()
        for name in settings | begun_with:
            old, new = begun_with.get(name), settings.get(name)
            if old != new:
                raise UserError(
                    f"--output_dir {str(self._path.parent)!r} holds a benchmark with {name} {old!r}, and now {name} is {new!r}; "
                    "expected the same settings, or another folder"
                )

    def entries(self, kind: str) -> list[Any]:
        """Returns everything that was appended under that kind, in order."""
        return [entry[kind] for entry in self._entries if kind in entry]

    def append(self, kind: str, value: Any) -> None:
        line = _line(kind, value)
        with open(self._path, "ab") as file:
            file.write(line)
        self._entries.append(json.loads(line))

    @property
    def settings(self) -> dict[str, Any]:
        return self._entries[0]["settings"]

    @property
    def costs(self) -> Costs | None:
        costs = self.entries("costs")
        return Costs(**costs[0]) if costs else None

    def runs(self) -> list[Run]:
        return [Run.from_json(values) for values in self.entries("run")]

    def divergences(self) -> list[Divergence]:
        return [Divergence(**values) for entry in self.entries("divergences") for values in entry["found"]]
