"""Prompt files: one JSON object a line, in the format of Spec-Bench and MT-bench."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any

from eesd_jax import files
from eesd_jax.errors import UserError

_FORMS = '{"turns": ["..."]}, {"prompt": "..."} or {"messages": [{"role": "...", "content": "..."}]}'


@dataclasses.dataclass(frozen=True)
class Conversation:
    """One record of a prompt file.

    Attributes:
      id: as given under `id` or `question_id`, else the line number.
      category: as given, else None.
      history: messages that come before the first turn.
      turns: user messages, to be answered in order, each with all before it in view.
      line: number of its line, from 1.
    """

    id: str | int
    category: str | None
    history: tuple[dict[str, str], ...]
    turns: tuple[str, ...]
    line: int


def read_prompts(path: str | os.PathLike) -> list[Conversation]:
    """Reads a prompt file, on this machine or remote (gs://...); blank lines are skipped.

    Raises:
      UserError: the file is missing or empty, or a line is not what is expected (its number is named).
    """
    remote = files.is_remote(path)
    try:
        text = _read_remote(str(path)) if remote else files.expand(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"prompt file {str(path)!r}: no such file") from None
    except OSError as error:
        raise UserError(f"prompt file {str(path)!r} cannot be read ({error.strerror or error})") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"prompt file {str(path)!r}, line {line}: byte {error.object[error.start]:#04x}; expected UTF-8 text") from None
    # Not splitlines(): JSON strings may hold U+2028 and other characters that it takes for ends of lines.
    conversations = [_parse(line, number, path) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not conversations:
        raise UserError(f"prompt file {str(path)!r} is empty; expected one JSON object a line: {_FORMS}")
    return conversations


def _read_remote(path: str) -> str:
    from etils import epath  # which local files do without

    try:
        return epath.Path(path).read_bytes().decode("utf-8-sig")
    except (ImportError, KeyError) as error:  # no library for that kind of address, or no such kind
        raise UserError(f"prompt file {path!r} cannot be read ({error})") from None


def is_text(value: Any) -> bool:
    """Whether a value can be a prompt: a string that is not blank, and of whole characters (JSON and argv can carry half ones)."""
    return isinstance(value, str) and bool(value.strip()) and is_unicode(value)


def is_unicode(text: str) -> bool:
    """Whether a text is of whole characters."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def is_whole(value: Any) -> bool:
    """Whether every string in a JSON value is of whole characters: JSON and argv can carry halves of them, which no file can."""
    left = [value]
    while left:
        match left.pop():
            case str() as text if not is_unicode(text):
                return False
            case dict() as parts:
                left += [*parts, *parts.values()]
            case list() as parts:
                left += parts
    return True


def _parse(line: str, number: int, path: str | os.PathLike) -> Conversation:
    where = f"prompt file {str(path)!r}, line {number}"
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
        raise UserError(f"{where}: not valid JSON ({reason}); expected {_FORMS}") from None
    match record:
        case {"turns": [*turns]}:
            history = []
        case {"prompt": prompt}:
            history, turns = [], [prompt]
        case {"messages": [*history, {"role": "user", "content": prompt}]}:
            turns = [prompt]
        case {"messages": [*_, _]}:
            raise UserError(f"{where}: the last message is {_short(record['messages'][-1])}; expected one of the role 'user'")
        case _:
            raise UserError(f"{where}: found {_short(record)}; expected {_FORMS}")
    if not turns:
        raise UserError(f"{where}: turns is empty; expected a list of texts")
    for turn in turns:
        if not is_text(turn):
            raise UserError(f"{where}: prompt {_short(turn)}; expected a text that is not blank")
    for message in history:
        if not (isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)):
            raise UserError(f'{where}: message {_short(message)}; expected {{"role": "...", "content": "..."}}')
    check_whole({"message": history, "category": record.get("category"), "id": record.get("id", record.get("question_id"))}, where)
    category, identity = record.get("category"), record.get("id", record.get("question_id"))
    if not isinstance(category, str | None):
        raise UserError(f"{where}: category {_short(category)}; expected a text")
    if isinstance(identity, bool) or not isinstance(identity, str | int | None):
        raise UserError(f"{where}: id {_short(identity)}; expected a text or an integer")
    return Conversation(number if identity is None else identity, category, tuple(history), tuple(turns), number)


def check_whole(values: dict[str, Any], where: str) -> None:
    """Raises UserError, naming the one, for a value of which a string holds half a character (a lone surrogate)."""
    for name, value in values.items():
        for part in value if isinstance(value, list) else [value]:
            if not is_whole(part):
                raise UserError(f"{where}: {name} {_short(part)} holds half a character (a lone surrogate); expected whole ones")


def _short(value: Any, limit: int = 80) -> str:
    text = json.dumps(value)
    return text if len(text) <= limit else f"{text[:limit]}..."


def prompts_sha256(conversations: Sequence[Conversation]) -> str:
    """Part of a hash of all that is asked."""
    content = json.dumps([[c.id, c.category, c.history, c.turns] for c in conversations]).encode()
    return hashlib.sha256(content).hexdigest()[:16]
