"""Prompt files: one JSON object a line, in the format of Spec-Bench and MT-bench."""

import dataclasses
import json
import pathlib

from eesd_jax.errors import UserError

_FORMS = '{"turns": ["..."]}, {"prompt": "..."} or {"messages": [{"role": "...", "content": "..."}]}'


@dataclasses.dataclass(frozen=True)
class Conversation:
    """One record of a prompt file.

    Attributes:
      id: as given, else the line number.
      category: as given, else None.
      history: messages that come before the first turn.
      turns: user messages, to be answered in order, each with all before it in view.
    """

    id: str | int
    category: str | None
    history: tuple[dict[str, str], ...]
    turns: tuple[str, ...]


def read_prompts(path: str | pathlib.Path) -> list[Conversation]:
    """Reads a prompt file.

    Raises:
      UserError: the file is missing or empty, or a line is not what is expected (its number is named).
    """
    path = pathlib.Path(path).expanduser()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise UserError(f"prompt file {str(path)!r}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompt file {str(path)!r} cannot be read as UTF-8 text ({error})") from None
    conversations = [_parse(line, number, path) for number, line in enumerate(lines, start=1) if line.strip()]
    if not conversations:
        raise UserError(f"prompt file {str(path)!r} is empty; expected one JSON object a line: {_FORMS}")
    return conversations


def _parse(line: str, number: int, path: pathlib.Path) -> Conversation:
    where = f"prompt file {str(path)!r}, line {number}"
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not valid JSON ({error.msg} at column {error.colno})") from None
    if not isinstance(record, dict):
        raise UserError(f"{where}: found {type(record).__name__}; expected {_FORMS}")
    history: list[dict[str, str]] = []
    match record:
        case {"turns": [*turns]}:
            pass
        case {"prompt": prompt}:
            turns = [prompt]
        case {"messages": [*history, {"role": "user", "content": last}]}:
            turns = [last]
        case _:
            raise UserError(f"{where}: expected {_FORMS}, messages ending with the user's")
    messages_fit = all(isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in history)
    if not turns or not messages_fit or not all(isinstance(turn, str) and turn for turn in turns):
        raise UserError(f"{where}: every turn and every message's content must be a text that is not empty")
    return Conversation(record.get("id", number), record.get("category"), tuple(history), tuple(turns))
