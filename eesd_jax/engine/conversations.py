"""Conversations as the model's input: what the commands that answer prompt files share."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from eesd_jax.engine.prompts import Conversation
from eesd_jax.errors import UserError

if TYPE_CHECKING:
    from eesd_jax.engine.engine import Engine


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
