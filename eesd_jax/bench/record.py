"""Keeps what a benchmark has measured: answers, costs of rounds, divergences of greedy answers; and the journal that holds them."""

import dataclasses
from typing import Any, NamedTuple

from eesd_jax import files
from eesd_jax.engine.generation import Rounds

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


class Journal(files.Journal):
    """Keeps what a benchmark has done so far; see `files.Journal`."""

    KIND = "benchmark"
    FLAG = "--output_dir"
    ELSE = "another folder"

    @property
    def _where(self) -> str:
        return f"--output_dir {str(self._path.parent)!r}"

    def entries(self, kind: str) -> list[Any]:
        """Returns everything that was appended under that kind, in order."""
        return [line[kind] for line in self.lines if kind in line]

    def append(self, kind: str, value: Any) -> None:
        """Keeps what is done, on disk when this returns."""
        self.keep({kind: value})

    @property
    def costs(self) -> Costs | None:
        costs = self.entries("costs")
        return Costs(**costs[0]) if costs else None

    def runs(self) -> list[Run]:
        return [Run.from_json(values) for values in self.entries("run")]

    def divergences(self) -> list[Divergence]:
        return [Divergence(**values) for entry in self.entries("divergences") for values in entry["found"]]
