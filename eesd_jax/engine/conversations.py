"""Conversations as the model's input: what the commands that answer prompt files share."""

import dataclasses
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from eesd_jax.config import SamplingConfig
from eesd_jax.engine.generation import Generation, Rounds
from eesd_jax.engine.prompts import Conversation
from eesd_jax.errors import UserError

if TYPE_CHECKING:
    from eesd_jax.decode.controllers import Controller
    from eesd_jax.engine.engine import Engine

Place = tuple[int, int]  # of an answer: the conversation's in its file, and the turn's, from 0
# The answer to a turn for which the turns before it left no room.
NO_ROOM = Generation("", [], prompt_tokens=0, finish_reason="length", log=Rounds.plain(0), seconds=0.0, first_token_seconds=0.0)


@dataclasses.dataclass(frozen=True)
class Options:
    """How prompts are answered, the same for all controllers.

    batch_size: rows of the compiled programs. seed: conversation i of the file draws with seed + i. stop: strings that end an answer.
    chat: whether prompts go through the chat template.
    """

    sampling: SamplingConfig
    batch_size: int
    seed: int
    stop: tuple[str, ...]
    chat: bool


def encode(engine: "Engine", messages: Sequence[dict[str, str]], chat: bool) -> list[int]:
    """Token ids of a conversation; without a chat template its texts, one after the other."""
    return engine.encode(messages if chat else "\n".join(message["content"] for message in messages), chat=chat)


def check_prompts(engine: "Engine", conversations: Sequence[Conversation], chat: bool, source: str) -> None:
    """Finds the records that cannot be answered before any is: a first turn that is too long, or a later one that is so even alone.

    Args:
      chat: whether prompts go through the chat template.
      source: the file's name, for the message.

    Raises:
      UserError: there is such a record.
    """
    for conversation in conversations:
        first, *later = ({"role": "user", "content": turn} for turn in conversation.turns)
        for turn, messages in enumerate([[*conversation.history, first], *([message] for message in later)], start=1):
            try:
                encode(engine, messages, chat)
            except UserError as error:
                raise UserError(f"prompt file {source!r}, line {conversation.line}, turn {turn}: {error}") from None


def answer_batch(
    engine: "Engine",
    batch: Mapping[int, Conversation],
    done: Mapping[Place, str | None],
    options: Options,
    controller: "Controller | None",
    warn: Callable[[str], None],
) -> Iterator[dict[Place, Generation]]:
    """Answers some conversations side by side; yields the answers of a turn.

    Args:
      batch: conversations, by their place in the file.
      done: the texts of turns that were answered before, None where there was no room; they are not answered again.
      warn: told of turns that the answers before them have left no room for.
    """
    histories = {index: list(conversation.history) for index, conversation in batch.items()}

    def take(index: int, text: str | None) -> None:
        histories[index] += [] if text is None else [{"role": "assistant", "content": text}]

    for turn in range(max(len(conversation.turns) for conversation in batch.values())):
        rows, answers = {}, {}
        for index, conversation in batch.items():
            if turn >= len(conversation.turns):
                continue
            histories[index].append({"role": "user", "content": conversation.turns[turn]})
            if (index, turn) in done:
                take(index, done[index, turn])
                continue
            try:
                rows[index] = encode(engine, histories[index], options.chat)
            except UserError as error:
                warn(f"line {conversation.line}, turn {turn + 1} is left without an answer: {error}")
                answers[index, turn] = NO_ROOM
        generations = _generate(engine, rows, options, controller)
        for index, generation in zip(rows, generations, strict=True):
            take(index, generation.text)
            answers[index, turn] = generation
        if answers:
            yield answers


def _generate(engine: "Engine", rows: Mapping[int, list[int]], options: Options, controller: "Controller | None") -> list[Generation]:
    if not rows:
        return []
    return engine.generate_ids(
        list(rows.values()),
        seeds=[options.seed + index for index in rows],
        sampling=options.sampling,
        stop=options.stop,
        batch_size=options.batch_size,
        controller=controller,
    )


def places(conversations: Sequence[Conversation], done: Container[Place] = ()) -> list[Place]:
    """Of all answers to a file, in their order, without those that are done."""
    every = ((index, turn) for index, conversation in enumerate(conversations) for turn in range(len(conversation.turns)))
    return [place for place in every if place not in done]
