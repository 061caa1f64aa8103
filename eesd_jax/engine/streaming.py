"""From token ids to text as they come: pieces that never split a multi-byte character, stop strings, and tokens that are no text."""

from collections import deque
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

if TYPE_CHECKING:  # it takes as long as JAX to import, and nothing needs it before a model is loaded
    from transformers import PreTrainedTokenizerBase

_REPLACEMENT = "\ufffd"  # what decoders put for bytes that are no character, or not one yet


class TextStream:
    """Turns the new tokens of one row into text.

    Characters appear once all of their bytes are there, and text that may be the start of a stop string is held back until that is decided.
    The stop string that is complete first ends the text; of several that end at the same place, the longest. So the text does not depend on
    how it is cut into tokens.

    Special tokens and the tokens that end a text are not shown. A stop string that names one of them, alone or among other text, is looked
    for in the text with all of them in it: it ends the text whether the model gave the token itself or the letters of its name.

    Text is decoded a few tokens at a time, so the work does not grow with what came before. The window starts with tokens that were shown
    already, because some decoders strip the space before the first token that they see. (`tokenizers.decoders.DecodeStream` does the same,
    but raises when a later token changes how earlier ones are decoded, as a stray byte does in SentencePiece vocabularies.)

    Attributes:
      text: everything shown so far.
      num_tokens: tokens that belong to the text: all that were pushed, or those up to and including the one that completed a stop string.
      stopped: whether a stop string was found; it and all behind it are cut off.

    Args:
      tokenizer: any fast tokenizer.
      stop: strings that end the text.
      end_ids: tokens that end a text, special or not.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", stop: Sequence[str] = (), end_ids: Iterable[int] = ()):
        self._core = tokenizer.backend_tokenizer
        self._hidden = _hidden_tokens(self._core, end_ids)
        stop = {string for string in stop if string}
        with_hidden = {string for string in stop if any(name in string for name in self._hidden.values() if name)}
        self._in_text, self._in_all = _Watch(stop - with_hidden), _Watch(with_hidden)
        self._ids: list[int] = []  # those that are text
        self._window = 0  # the first token of the window
        self._fresh = 0  # the first token of the window whose text was not complete when the window was moved
        self._known = ""  # text of the window that is in `_decoded`
        self._decoded = ""
        self.num_tokens = 0
        self.text = ""
        self.stopped = False

    def push(self, token_ids: Sequence[int]) -> str:
        """Takes new tokens and returns the text that may be shown now; tokens behind a stop string are dropped."""
        shown_before = len(self.text)
        for token_id in map(int, token_ids):
            if self.stopped:
                break
            self.num_tokens += 1
            if token_id in self._hidden:
                self._pass_over(self._hidden[token_id])
            else:
                self._ids.append(token_id)
                self._extend(self._next_piece())
        return self.text[shown_before:]

    def close(self) -> str:
        """Returns what was held back, incomplete characters as U+FFFD; to be called once, at the end."""
        if self.stopped:
            return ""
        shown_before = len(self.text)
        self._extend(self._next_piece(at_end=True))
        if not self.stopped:
            self.text = self._decoded
        return self.text[shown_before:]

    def _next_piece(self, *, at_end: bool = False) -> str:
        """Text that the tokens of the window add to what is known, up to a character that may be incomplete."""
        whole = self._decode_from(self._window)
        if not whole.startswith(self._known):
            # A stray byte made the decoder give up on the bytes before it as well; those were shown, and stay.
            self._window, self._known = self._fresh, ""
            whole = self._decode_from(self._window)
        complete = whole if at_end else whole.rstrip(_REPLACEMENT)
        piece = complete[len(self._known) :]
        if piece and complete == whole:
            self._window, self._fresh = self._fresh, len(self._ids)
            self._known = self._decode_from(self._window)
        else:
            self._known += piece
        return piece

    def _decode_from(self, start: int) -> str:
        return self._core.decode(self._ids[start:], skip_special_tokens=True)

    def _extend(self, piece: str) -> None:
        searched = len(self._decoded)
        self._decoded += piece
        for place, character in enumerate(piece, start=searched):
            for watch in (self._in_text, self._in_all):
                watch.push(character, place)
            if self._stop_where_found():
                return
        self._show()

    def _pass_over(self, name: str) -> None:
        """A token that is not shown."""
        for character in name:
            self._in_all.push(character, len(self._decoded))
        if not self._stop_where_found():
            self._show()

    def _stop_where_found(self) -> bool:
        starts = [start for watch in (self._in_text, self._in_all) if (start := watch.found()) is not None]
        if starts:
            self.text = self._decoded = self._decoded[: min(starts)]
            self.stopped = True
        return self.stopped

    def _show(self) -> None:
        """All but the longest end of the text that begins a stop string."""
        self.text = self._decoded[: min(len(self._decoded), self._in_text.begun(), self._in_all.begun())]


class _Watch:
    """Looks for strings at the end of a text that grows by single characters, each of which stands at a place of the shown text."""

    def __init__(self, strings: Iterable[str]):
        self._strings = sorted(strings, key=len, reverse=True)
        self._longest = len(self._strings[0]) if self._strings else 0
        self._text = ""  # its last characters, as many as matter
        self._places: deque[int] = deque(maxlen=self._longest)

    def push(self, character: str, place: int) -> None:
        if self._longest:
            self._text = (self._text + character)[-self._longest :]
            self._places.append(place)

    def found(self) -> int | None:
        """Where the string starts that is complete now; of several the longest, so that what is cut off starts earliest."""
        string = next((string for string in self._strings if self._text.endswith(string)), None)
        return None if string is None else self._places[-len(string)]

    def begun(self) -> float:
        """Where the longest end starts that begins one of the strings; infinity where none does."""
        for size in range(min(self._longest - 1, len(self._text)), 0, -1):
            if any(string.startswith(self._text[-size:]) for string in self._strings):
                return self._places[-size]
        return float("inf")


def _hidden_tokens(core: Tokenizer, end_ids: Iterable[int]) -> dict[int, str]:
    """Ids of the tokens that are not shown, and their names."""
    hidden = {token_id: token.content for token_id, token in core.get_added_tokens_decoder().items() if token.special}
    for token_id in end_ids:
        if token_id not in hidden:  # a token that ends a text may be any token
            known = 0 <= token_id < 2**32 and core.id_to_token(token_id) is not None
            hidden[token_id] = core.decode([token_id], skip_special_tokens=False) if known else ""
    return hidden
