"""The file that answers go to: complete under its name, and until then a journal beside it, `FILE.partial`, that survives every end.

The journal has the run's settings in its first line and then an answer a line, each with its place: which conversation, and which turn. The
same command goes on behind what is there; one with other settings is refused.
"""

import contextlib
import json
import os
import pathlib
from collections.abc import Iterable
from typing import Any, TextIO

from eesd_jax import files
from eesd_jax.engine.conversations import NO_ROOM, Place
from eesd_jax.engine.generation import Generation
from eesd_jax.errors import UserError

FORMAT_VERSION = 1  # of the journal
_PLACE = "place"


def record(identity: str | int, turn: int, prompt: str, generation: Generation) -> dict[str, Any]:
    """One line of --output."""
    return {
        "id": identity,
        "turn": turn,
        "prompt": prompt,
        "text": generation.text,
        "token_ids": generation.token_ids,
        "new_tokens": len(generation.token_ids),
        "rounds": generation.rounds,
        "drafted": generation.drafted,
        "accepted": generation.accepted,
        "tokens_per_round": generation.tokens_per_round,
        "seconds": round(generation.seconds, 4),
        "finish_reason": generation.finish_reason,
    }


_FIELDS = {*record("", 0, "", NO_ROOM), _PLACE}


def to_text(line: dict[str, Any]) -> str:
    """A record as it is written."""
    return json.dumps(line, ensure_ascii=False) + "\n"


class AnswerLines:
    """Answers that are written as they come, and kept nowhere: to stdout or a pipe, each when all before it are there; or not at all.

    Args:
      file: where to; None for nowhere.
      name: of the file, for messages.
      order: the places of all answers; without it they are written as they come.
    """

    def __init__(self, file: TextIO | None = None, name: str = "", order: Iterable[Place] = ()):
        self._file, self._name = file, name
        self._order = list(reversed(list(order)))
        self._waiting: dict[Place, dict[str, Any]] = {}
        self.texts: dict[Place, str | None] = {}

    def add(self, lines: dict[Place, dict[str, Any]]) -> None:
        """Takes answers that are complete."""
        self._waiting |= lines if self._file is not None else {}
        ready = [] if self._order else list(self._waiting)
        while self._order and self._order[-1] in self._waiting:
            ready.append(self._order.pop())
        try:
            for place in ready:
                print(to_text(self._waiting.pop(place)), end="", file=self._file, flush=True)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise UserError(f"cannot write {self._name} ({error.strerror}); expected room for {len(ready)} more lines") from None

    def finish(self) -> None:
        """All are written already."""

    def close(self) -> None:
        """There is nothing to be taken away."""


class _Journal(files.Journal):
    ELSE = "another --output (or take that file away, and with it the answers in it)"


def partial_of(output: str) -> pathlib.Path:
    """Where answers are kept until all are there."""
    target = files.expand(output)
    return pathlib.Path(f"{os.path.realpath(target) if target.is_symlink() else target}.partial")


def check(output: str, settings: dict[str, Any]) -> None:
    """Finds before a model is loaded what `AnswerFile` would refuse behind it.

    Args:
      settings: those that are known yet.

    Raises:
      UserError: the file cannot be written, or answers of other settings are there.
    """
    files.check_writable(output)
    partial = partial_of(output)
    if partial.exists() and b"\n" in partial.read_bytes():  # else a kill has left not even the settings
        _Journal.read(partial).check(settings, set(settings))


class AnswerFile:
    """Answers of a run, by place.

    Args:
      output: the file in which all answers will be.
      settings: all that answers depend on.
      order: the places that answers can have; without it any.

    Raises:
      UserError: it cannot be written, or answers of other settings or what is no answer is there.
    """

    def __init__(self, output: str, settings: dict[str, Any], order: Iterable[Place] = ()):
        self.partial = partial_of(output)
        self._output = output
        self._journal = _Journal(self.partial, settings)
        self._lines: dict[Place, dict[str, Any]] = {}
        known = set(order)
        for number, line in enumerate(self._journal.lines, start=2):
            match line:
                case {"place": [int() as index, int() as turn], "text": str(), "new_tokens": int()} if line.keys() == _FIELDS and (
                    not known or (index, turn) in known
                ):
                    self._lines[index, turn] = {name: value for name, value in line.items() if name != _PLACE}
                case _:
                    raise UserError(f"{str(self.partial)!r}, line {number} is no answer; expected another --output")

    @property
    def texts(self) -> dict[Place, str | None]:
        """What was answered, None where there was no room for an answer."""
        return {place: line["text"] if line["new_tokens"] else None for place, line in self._lines.items()}

    def add(self, lines: dict[Place, dict[str, Any]]) -> None:
        """Keeps answers that are complete, all of them or none; they are on disk when this returns."""
        self._journal.keep(*(line | {_PLACE: place} for place, line in lines.items()))
        self._lines |= lines

    def finish(self) -> None:
        """Writes the file of all answers, in the order of their places; then the journal is gone."""
        try:
            with files.whole_file(self._output) as file:
                file.writelines(to_text(self._lines[place]) for place in sorted(self._lines))
        except UserError as error:
            raise UserError(f"{error}; all answers are kept in {str(self.partial)!r}, and the same command goes on from there") from None
        self._journal.close()
        self.partial.unlink(missing_ok=True)

    def close(self) -> None:
        """Ends a run that is not finished; a journal without answers goes."""
        self._journal.close()
        if not self._lines:
            with contextlib.suppress(OSError):
                self.partial.unlink()
