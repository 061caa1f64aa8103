"""Chats as training text: a JSONL file of one `{"messages": [...]}` a line, whose assistant's turns are taken as the target's.

Each turn is trained on in the rendering that its prompt has in use: the messages before it through the chat template, as `Engine.encode`
makes it. Many templates only ever append, and then all turns of a chat are one example. Others render a turn otherwise once later ones
follow it (those of reasoning models leave out what was thought before): their turns are examples of their own.
"""

import json
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from eesd_jax.distill.example import Example, Target
from eesd_jax.engine.encoding import Encoder
from eesd_jax.engine.prompts import check_whole
from eesd_jax.errors import UserError

_MESSAGES_FORM = '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}'
# How reasoning models mark what they think before they answer; a prompt of theirs may end within it.
_OPEN, _CLOSE, _NO_THOUGHT = "<think>", "</think>", "\n</think>\n\n"


def read(path: epath.Path, model: Target) -> list[list[Example]]:
    """The examples of every chat of a file.

    Raises:
      UserError: no file of chats; the line is named.
    """
    name = os.fspath(path)
    if not model.tokenizer.chat_template:
        raise UserError(f"chats in {name!r} need a chat template, and this model has none; expected a dataset of train/self_generate.py")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"dataset {name!r}, line {line}: byte {error.object[error.start]:#04x}; expected UTF-8 text") from None
    # Not splitlines(): JSON strings may hold U+2028 and other characters that it takes for ends of lines.
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        raise UserError(f"dataset {name!r} is empty; expected one JSON object a line: {_MESSAGES_FORM}")
    encoder = Encoder(model)
    return [encode_chat(_read_line(line, where := f"dataset {name!r}, line {number}"), where, encoder) for number, line in lines]


def _read_line(line: str, where: str) -> list[dict[str, Any]]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON ({error}); expected {_MESSAGES_FORM}") from None
    messages = record.get("messages") if isinstance(record, dict) else None
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: no messages; expected {_MESSAGES_FORM}")
    for message in messages:
        if not (isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)):
            raise UserError(f"{where}: a message is {json.dumps(message)[:80]}; expected {_MESSAGES_FORM}")
    check_whole({"message": messages}, where)
    if not any(message["role"] == "assistant" for message in messages):
        shown = repr(" ".join(message["content"] for message in messages)[:160])
        raise UserError(f"{where}: no message of the role 'assistant', so its response mask is empty; it reads {shown}")
    return messages


class _Turn(NamedTuple):
    """Token ids. prompt: of the messages before an assistant's turn. written: of the turn. behind: what the template adds to its end."""

    prompt: list[int]
    written: list[int]
    behind: list[int]


def encode_chat(messages: Sequence[dict[str, Any]], where: str, encoder: Encoder) -> list[Example]:
    """Tokens of a conversation, and which of them are an assistant's turn, the token that ends it included.

    Every turn is in one example. There it stands behind the very tokens that are its prompt in use.

    Raises:
      UserError: the template refuses the messages.
    """
    examples: list[tuple[list[int], list[bool]]] = []
    for place, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        turn = _encode_turn(_Rendering(messages, place, where, encoder))
        if not examples or turn.prompt[: len(examples[-1][0])] != examples[-1][0]:
            examples.append(([], []))
        tokens, response = examples[-1]
        for ids, is_response in ((turn.prompt[len(tokens) :], False), (turn.written, True), (turn.behind, False)):
            tokens += ids
            response += [is_response] * len(ids)
    return [Example(np.array(tokens, np.int32), np.array(response, bool)) for tokens, response in examples]


class _Rendering:
    """A chat up to an assistant's turn, as the template has it.

    Attributes:
      message: the turn.
      prompt_ids, whole_ids: of the messages before it, with the beginning of the turn, and of all with the turn, as they are in use.
      before: text of the messages before it. prompt: the same, and the beginning of the turn. whole: the same with the turn.
    """

    def __init__(self, messages: Sequence[dict[str, Any]], place: int, where: str, encoder: Encoder):
        before, to_the_end = list(messages[:place]), list(messages[: place + 1])
        self.message, self.encoder = messages[place], encoder
        try:
            self.prompt_ids = encoder.of_messages(before, where)
            self.whole_ids = encoder.of_messages(to_the_end, where, add_generation_prompt=False)
            self.prompt = encoder.render(before, where)
            self.whole = encoder.render(to_the_end, where, add_generation_prompt=False)
            self.before = encoder.render(before, where, add_generation_prompt=False) if before and not self.appends else ""
        except UserError as error:
            raise UserError(f"{where}: {error}") from None

    @property
    def appends(self) -> bool:
        """Whether the turn stands behind its prompt."""
        return self.whole.startswith(self.prompt)

    def ids(self, text: str) -> list[int]:
        return self.encoder.tokenizer(text, add_special_tokens=False).input_ids


def _encode_turn(chat: _Rendering) -> _Turn:
    prompt, whole = chat.prompt_ids, chat.whole_ids
    if whole[: len(prompt)] == prompt:
        rest = whole[len(prompt) :]
    elif chat.appends:  # the last characters of the prompt and the first of the turn would be one token: the model writes the turn's own
        rest = chat.ids(chat.whole[len(chat.prompt) :])
    else:
        rest = chat.ids(_text_in_use(chat)) + chat.ids(_end_of_turn(chat))
    # What the template adds behind the end of a turn is not the model's.
    count = next((place + 1 for place, token in enumerate(rest) if token in chat.encoder.end_ids), len(rest))
    return _Turn(prompt, rest[:count], rest[count:])


def _text_in_use(chat: _Rendering) -> str:
    """What the model writes behind the prompt, where the template does not render it so: from the message itself.

    A prompt that ends within a thought has begun what the message may hold as well; and where the message holds no thought, the model
    closes it at once.
    """
    text, thought = chat.message["content"], chat.message.get("reasoning_content")
    if isinstance(thought, str) and _CLOSE not in text:
        text = f"{_OPEN}\n{thought.strip()}{_NO_THOUGHT}{text}"
    begun = chat.prompt.removeprefix(chat.before)
    for prompt in (begun, begun.rstrip()):
        for length in range(min(len(prompt), len(text)), 0, -1):
            if prompt.endswith(text[:length]) and text[:length].strip():
                return text[length:]
    if _OPEN in begun and _CLOSE not in begun + text:
        return _NO_THOUGHT + text
    return text


def _end_of_turn(chat: _Rendering) -> str:
    """What ends the turn: what the template has behind its answer, else the tokenizer's EOS."""
    answer = chat.message["content"].rpartition(_CLOSE)[2].strip()
    _, found, behind = chat.whole.rpartition(answer) if answer else ("", "", "")
    if found and any(token in chat.encoder.end_ids for token in chat.ids(behind)):
        return behind
    return chat.encoder.tokenizer.eos_token or ""
