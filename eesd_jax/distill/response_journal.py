"""What self-generation keeps of unfinished work: one file a process, a JSON object a line; and the settings that it was begun with.

    settings.json, target.json    what every process must have, too: settings, and hashes of the model
    00000.jsonl                   process 0: {"index", "tokens", "ended"} a response, with "features" where they were kept,
                                  {"index", "user"} a user's turn
    finished-00000-of-00002       process 0 of 2 has made all its responses

Only whole lines count. On remote storage, whose files cannot be appended to, a process writes one file after the other.
"""

import json
import os
import time
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from eesd_jax import files
from eesd_jax.errors import UserError

_SETTINGS, _TARGET = "settings.json", "target.json"
_FLUSH_SECONDS = 30.0  # between two files on remote storage


def check_same(settings: dict[str, Any], begun_with: dict[str, Any], output_dir: str) -> None:
    """Raises UserError, naming the fields, where responses were begun with other settings."""
    names = [name for name in begun_with | settings if begun_with.get(name) != settings.get(name)]
    if names:
        differences = "; ".join(f"{name} was {begun_with.get(name)!r}, and now is {settings.get(name)!r}" for name in names)
        raise UserError(
            f"output_dir {output_dir!r} holds responses of other settings: {differences}; expected the same, or another output_dir"
        )


def check_settings_file(folder: epath.Path, settings: dict[str, Any], output_dir: str) -> None:
    """Raises UserError where the journals in that folder, if there are any, were begun with other settings."""
    if (folder / _SETTINGS).exists():
        _check_file(folder / _SETTINGS, settings, output_dir)


def _check_file(path: epath.Path, ours: dict[str, Any], output_dir: str) -> None:
    try:
        theirs = json.loads(path.read_text())
    except ValueError:
        theirs = None
    if not isinstance(theirs, dict):
        raise UserError(f"{os.fspath(path)!r} is damaged; expected another output_dir than {output_dir!r}")
    check_same(ours, theirs, output_dir)


class Answer(NamedTuple):
    """A response that is complete.

    tokens: int32, its EOS included. ended: whether it has one. features: the process that made it, the first of its records in that
    process's file of features, and how many they are (see `feature_file.py`); None where none were kept.
    """

    tokens: np.ndarray
    ended: bool
    features: tuple[int, int, int] | None = None


class Journal:
    """What has been made so far, by all processes; only whole lines count.

    Args:
      folder: of the journals.
      settings, target: what they must have been begun with: how text is made, and hashes of the model.
      process_index: whose file is written to.
      output_dir: for messages.

    Raises:
      UserError: other settings, or a file that is no journal.
    """

    def __init__(self, folder: epath.Path, settings: dict[str, Any], target: dict[str, Any], process_index: int, output_dir: str):
        self._folder = folder
        self._process_index = process_index
        self._output_dir = output_dir
        self._is_local = "://" not in os.fspath(folder)
        self.users: dict[int, str] = {}
        self.answers: dict[int, Answer] = {}
        self._unwritten, self._flushed = b"", time.monotonic()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._agree(_SETTINGS, settings)
            self._agree(_TARGET, target)
            self.read()
            self._part = sum(1 for path in self._files() if path.name.startswith(self._stem))
            if self._is_local:
                self._truncate()
        except OSError as error:
            raise UserError(f"output_dir {output_dir!r} cannot be used ({error}); expected a folder that can be written to") from None

    def _agree(self, name: str, ours: dict[str, Any]) -> None:
        """The first process writes what all that come after must have, too."""
        path = self._folder / name
        if not path.exists():
            files.write_whole(
                path, json.dumps(ours, indent=2)
            )  # of processes that come together, each writes the same, or the last one's is refused by the others
        _check_file(path, ours, self._output_dir)

    @property
    def _stem(self) -> str:
        return f"{self._process_index:05d}"

    def _files(self) -> list[epath.Path]:
        return sorted(path for path in self._folder.iterdir() if path.name.endswith(".jsonl"))

    def read(self) -> None:
        """Takes in what is on disk, of all processes."""
        for path in self._files():
            content = path.read_bytes()
            for number, line in enumerate(content[: content.rfind(b"\n") + 1].splitlines(), start=1):
                try:
                    self._take(json.loads(line))
                except (ValueError, KeyError, TypeError, OverflowError):
                    raise UserError(
                        f"{os.fspath(path)!r}, line {number}: no line of a journal; expected another output_dir than {self._output_dir!r}"
                    ) from None

    def _take(self, entry: dict[str, Any]) -> None:
        if "user" in entry:
            self.users[int(entry["index"])] = str(entry["user"])
        else:
            features = None
            if "features" in entry:
                process, first, count = map(int, entry["features"])
                features = process, first, count
            self.answers[int(entry["index"])] = Answer(np.array(entry["tokens"], np.int32), bool(entry["ended"]), features)

    def _truncate(self) -> None:
        """Takes away a line that a kill has cut off, so that the next one begins on its own."""
        path = self._folder / f"{self._stem}.jsonl"
        if path.exists():
            content = path.read_bytes()
            os.truncate(path, content.rfind(b"\n") + 1)

    def records_of(self, process: int) -> int:
        """Counts the records of features of one process that the journals vouch for."""
        places = (answer.features for answer in self.answers.values() if answer.features is not None)
        return max((first + count for owner, first, count in places if owner == process), default=0)

    def append(self, entry: dict[str, Any]) -> None:
        """Keeps what is complete: at once, or, where files cannot be appended to, with the next `flush`."""
        self._take(entry)
        self._unwritten += json.dumps(entry).encode() + b"\n"
        if self._is_local or time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Writes what is not written yet."""
        if not self._unwritten:
            return
        try:
            if self._is_local:
                with open(os.fspath(self._folder / f"{self._stem}.jsonl"), "ab") as file:
                    file.write(self._unwritten)
            else:
                # Objects of a bucket cannot be appended to: each time a new one.
                (self._folder / f"{self._stem}-{self._part:06d}.jsonl").write_bytes(self._unwritten)
                self._part += 1
        except OSError as error:
            raise UserError(f"output_dir {self._output_dir!r} cannot be written ({error}); what was made before is kept") from None
        self._unwritten, self._flushed = b"", time.monotonic()

    def _mark(self, process: int, count: int) -> epath.Path:
        return self._folder / f"finished-{process:05d}-of-{count:05d}"

    def mark_finished(self, process_count: int) -> None:
        """Tells the others that this process has made all its responses."""
        self._mark(self._process_index, process_count).write_text("")

    def all_finished(self, process_count: int) -> bool:
        return all(self._mark(process, process_count).exists() for process in range(process_count))
