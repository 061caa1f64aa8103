"""Keeps what a benchmark has measured: answers, costs of rounds, divergences of greedy answers; and the journal that holds them."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from eesd_jax import files
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

    def _read(self, kind: str, make: Callable[[Any], Any]) -> list[Any]:
        try:
            return [make(values) for values in self.entries(kind)]
        except (AttributeError, LookupError, OverflowError, TypeError, ValueError):
            raise UserError(f"{str(self._path)!r} has a damaged line of kind {kind!r}; expected what infer/benchmark.py wrote") from None

    @property
    def costs(self) -> Costs | None:
        """Returns what rounds cost, where it was measured."""
        costs = self._read("costs", _costs)
        return costs[0] if costs else None

    def runs(self) -> list[Run]:
        """Returns all runs."""
        return self._read("run", Run.from_json)

    def divergences(self) -> list[Divergence]:
        """Returns all divergences from plain decoding."""
        return [found for _, some in self._read("divergences", _divergences) for found in some]

    def compared(self) -> set[tuple[int, int]]:
        """Returns the batches and turns of them whose divergences are known."""
        return {place for place, _ in self._read("divergences", _divergences)}


def _costs(values: dict[str, Any]) -> Costs:
    return Costs(**values)


def _divergences(values: dict[str, Any]) -> tuple[tuple[int, int], list[Divergence]]:
    return (int(values["batch"]), int(values["turn"])), [Divergence(**found) for found in values["found"]]
