"""Where self-generation takes its prompts from: a JSONL file, a tfds dataset, or the model itself.

For `self`, a chat model is given its template up to where the user's turn begins, and writes that turn, too. So a branch can be trained
from nothing but the model.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import tensorflow_datasets as tfds
from etils import epath

from eesd_jax.engine.prompts import Conversation, is_text, read_prompts
from eesd_jax.errors import UserError

if TYPE_CHECKING:
    from eesd_jax.engine.engine import Engine

SELF = "self"
_TFDS = "tfds:"
_TEXT_FIELDS = ("prompt", "instruction", "question", "query", "inputs", "input", "text", "document", "article", "sentence")
_MARK = "EESDUSERTURN"  # stands for the user's turn where the template is taken apart


def read(prompts: str) -> list[Conversation]:
    """The prompts of a JSONL file or of `tfds:NAME`; of each record the first turn is answered.

    Args:
      prompts: a path, local or remote, or `tfds:` and the name of a dataset, or the folder of one.

    Raises:
      UserError: nothing there, or not what is expected.
    """
    if prompts.startswith(_TFDS):
        return _read_tfds(prompts)
    return read_prompts(prompts)


def fingerprint(conversations: Sequence[Conversation]) -> str:
    """SHA-256 of all that the prompts say, in order."""
    digest = hashlib.sha256()
    for conversation in conversations:
        digest.update(json.dumps([list(conversation.history), conversation.turns[0]]).encode() + b"\n")
    return digest.hexdigest()


def _read_tfds(prompts: str) -> list[Conversation]:
    name = prompts.removeprefix(_TFDS)
    try:
        # Without the code of a dataset, tfds finds those that were prepared into its data folder (TFDS_DATA_DIR) before.
        builder = tfds.builder_from_directory(name) if epath.Path(name).expanduser().is_dir() else tfds.builder(name)
        split = "train" if "train" in builder.info.splits else next(iter(builder.info.splits))
        source = builder.as_data_source(split)
        count = len(source)
        fields = list(builder.info.features)
    except BaseException as error:  # whatever tfds raises for what it does not know or cannot read without TensorFlow
        if isinstance(error, KeyboardInterrupt):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"prompts {prompts!r} cannot be read ({reason}); expected tfds:NAME of a dataset prepared on this machine as array_record"
        ) from None
    field = next((field for field in _TEXT_FIELDS if field in fields), None)
    if field is None:
        raise UserError(f"prompts {prompts!r}: its fields are {', '.join(fields)}; expected one of {', '.join(_TEXT_FIELDS)}")
    texts = (_text(source[i][field]) for i in range(count))
    found = [Conversation(i, None, (), (text,), i + 1) for i, text in enumerate(texts) if is_text(text)]
    if not found:
        raise UserError(f"prompts {prompts!r}: no example has text in its field {field!r}; expected texts")
    return found


def _text(value: Any) -> str | None:
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="replace")
    return value if isinstance(value, str) else None


class UserTurn:
    """What the model is given to write the user's turn, and how its answer is read.

    Attributes:
      header: token ids of the template up to the user's turn.

    Raises:
      UserError: no chat template, or one in which there is no such place.
    """

    def __init__(self, engine: "Engine"):
        tokenizer = engine.model.tokenizer
        if not engine.has_chat_template:
            raise UserError(f"prompts are {SELF!r}, and this model has no chat template; expected a JSONL file or tfds:NAME")
        try:
            text = tokenizer.apply_chat_template([{"role": "user", "content": _MARK}], tokenize=False, add_generation_prompt=True)
        except Exception as error:  # templates raise whatever jinja2 or their author chose
            raise UserError(f"the model's chat template refuses a user's turn: {error}") from None
        before, mark, behind = text.partition(_MARK)
        self.header: list[int] = tokenizer(before, add_special_tokens=False).input_ids
        if not mark or not self.header:
            raise UserError(
                f"prompts are {SELF!r}, and this model's chat template has nothing before the user's turn; expected a JSONL file"
            )
        self._end = behind.strip()
        self._tokenizer = tokenizer

    def read(self, tokens: Sequence[int]) -> str:
        """The user's turn in what the model wrote; empty where it wrote none."""
        whole = self._tokenizer.decode(tokens)
        if self._end and self._end in whole:  # a template whose turns do not end in an EOS
            return whole.partition(self._end)[0].strip()
        return self._tokenizer.decode(tokens, skip_special_tokens=True).strip()
