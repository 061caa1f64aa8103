"""From prompts to token ids: plain text, or messages through the model's chat template.

In a chat, what somebody wrote is text and nothing else: a user who types `<|im_end|>` must not end a turn, nor begin one in another's name.
Templates write texts and control tokens into one string, from which a tokenizer cannot tell them apart. So the control tokens in messages
are hidden from the template, those that it writes itself are given names that nobody can type, and a tokenizer that knows only these
names reads the result. All else is the model's own tokenizer, and prompts without control tokens go through that.
"""

import functools
import json
import re
import secrets
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from eesd_jax.engine import checks
from eesd_jax.errors import UserError, shown
from eesd_jax.weights.load import LoadedModel

if TYPE_CHECKING:  # it takes as long as JAX to import, and nothing needs it before a model is loaded
    from transformers import PreTrainedTokenizerBase

# Some files do not say of such tokens that they are special.
_LOOKS_SPECIAL = re.compile(r"<[|\uff5c].*[|\uff5c]>|<(start|end)_of_\w+>", re.DOTALL)
_PRIVATE = 0xF0000  # the first of the code points that no standard gives a meaning


class Encoder:
    """Turns prompts into token ids.

    Attributes:
      tokenizer: the model's. end_ids: of the tokens that end its texts.

    Args:
      model: whose tokenizer, vocabulary and context these are.
    """

    def __init__(self, model: LoadedModel):
        self.tokenizer: PreTrainedTokenizerBase = model.tokenizer
        self._config = model.config
        self.end_ids = model.eos_ids

    @property
    def has_chat_template(self) -> bool:
        return bool(self.tokenizer.chat_template)

    def encode(self, prompt: Any, chat: bool | None, split_special_tokens: bool | None, what: str) -> list[int]:
        """As `Engine.encode`; `what` is the prompt's name in messages."""
        in_chat = self.has_chat_template if checks.flag(chat, "chat") is None else chat
        split = checks.flag(split_special_tokens, "split_special_tokens")
        if isinstance(prompt, str):
            checks.check_unicode(prompt, what)
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else checks.messages(prompt, what)
        if in_chat or not isinstance(prompt, str):
            if not self.has_chat_template:
                raise UserError("this model has no chat template; expected a plain text prompt (chat off)")
            ids = self.of_messages(messages, what, split=split is not False)
        else:
            ids = self._split.core.encode(prompt).ids if split and self._has_control(prompt) else self.tokenizer(prompt).input_ids
        if not ids:
            raise UserError(f"{what} {shown(prompt)} has no tokens; expected some text")
        checks.check_length(len(ids), what, self._config)
        worst, last = max(ids), self._config.vocab_size - 1
        if worst > last:  # a tokenizer may have more tokens than the model; only their use is a mistake
            token = self.tokenizer.convert_ids_to_tokens(worst)
            raise UserError(f"{what} has the token {token!r}, whose id is {worst}; the model's vocabulary is 0 to {last}")
        return ids

    def of_messages(
        self, messages: list[dict[str, Any]], what: str, *, split: bool = True, add_generation_prompt: bool = True
    ) -> list[int]:
        """Token ids of messages through the chat template, however many; `add_generation_prompt` has the assistant's next turn begun."""
        texts: list[str] = []
        _in_texts(messages, lambda text: texts.append(text) or text)
        if not (split and any(map(self._has_control, texts))):
            return self.tokenizer(self.render(messages, what, add_generation_prompt), add_special_tokens=False).input_ids
        used = set("".join(texts))
        free = (chr(code) for code in range(_PRIVATE, 0x110000) if chr(code) not in used)
        stand_ins = dict(zip(self._split.names, free, strict=False))
        pattern, names = self._split.pattern, self._split.names
        hidden = _in_texts(messages, lambda text: pattern.sub(lambda found: stand_ins[found[0]], text))
        text = pattern.sub(lambda found: names[found[0]], self.render(hidden, what, add_generation_prompt))
        text = text.translate({ord(stand_in): name for name, stand_in in stand_ins.items()})
        return self._split.core.encode(text, add_special_tokens=False).ids

    def render(self, messages: list[dict[str, Any]], what: str, add_generation_prompt: bool = True) -> str:
        """Text of messages through the chat template, control tokens in them as they are."""
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
        except Exception as error:  # templates raise whatever jinja2 or their author chose
            raise UserError(f"the model's chat template refuses these messages: {error}") from None
        checks.check_unicode(text, what)  # messages may have more in them than a role and a content
        return text

    @functools.cached_property
    def _controls(self) -> re.Pattern:
        """Finds the names of control tokens in a text."""
        added = self.tokenizer.backend_tokenizer.get_added_tokens_decoder()
        names = [
            token.content
            for token_id, token in added.items()
            if token.special or token_id in self.end_ids or _LOOKS_SPECIAL.fullmatch(token.content)
        ]
        return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or r"(?!)")

    def _has_control(self, text: str) -> bool:
        """Whether a tokenizer may find a control token in a text, before it has normalised it or after."""
        normalizer = self.tokenizer.backend_tokenizer.normalizer
        return any(self._controls.search(form) for form in (text, normalizer.normalize_str(text) if normalizer else ""))

    @functools.cached_property
    def _split(self) -> "_SplitTokenizer":
        return _SplitTokenizer(self.tokenizer.backend_tokenizer, self._controls)


class _SplitTokenizer:
    """The same tokenizer with other names for its control tokens, so that it takes the old names for text.

    Attributes:
      core: the tokenizer. pattern: finds the old names in a text. names: from old names to new ones.
    """

    def __init__(self, core: Tokenizer, pattern: re.Pattern):
        self.pattern = pattern
        state = json.loads(core.to_str())
        secret = secrets.token_hex(8)  # nobody can type what nobody knows
        controls = [token for token in state["added_tokens"] if pattern.fullmatch(token["content"])]
        self.names = {token["content"]: f"<{secret}-{token['id']}>" for token in controls}
        for token in controls:
            token["content"] = self.names[token["content"]]
        model = state["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {self.names.get(piece, piece): token_id for piece, token_id in model["vocab"].items()}
        else:  # of a unigram model: pieces and their scores
            model["vocab"] = [[self.names.get(piece, piece), score] for piece, score in model["vocab"]]
        if "merges" in model:
            whole = [merge if isinstance(merge, list) else merge.split(" ", 1) for merge in model["merges"]]
            model["merges"] = [list(merge) for merge in whole if not {*merge, "".join(merge)} & self.names.keys()]
        if isinstance(unknown := model.get("unk_token"), str):
            model["unk_token"] = self.names.get(unknown, unknown)
        self.core = Tokenizer.from_str(json.dumps(state))


def _in_texts(value: Any, change: Callable[[str], str]) -> Any:
    """A message, or any part of one, with each text in it changed; names of fields stay."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {name: _in_texts(part, change) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_in_texts(part, change) for part in value]
    return value
