"""From token ids to text as they come: pieces that never split a multi-byte character, and stop strings."""

from collections.abc import Sequence

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase


class TextStream:
    """Turns the new tokens of one row into text.

    Characters appear once all of their bytes are there, and text that may be the start of a stop string is held back until that is decided.

    Attributes:
      text: everything shown so far.
      num_tokens: tokens that belong to the text: all that were pushed, or those up to and including the one that completed a stop string.
      stopped: whether a stop string was found; it and all behind it are cut off.

    Args:
      tokenizer: any fast tokenizer.
      stop: strings that end the text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()):
        self._core = tokenizer.backend_tokenizer
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._stop = [string for string in stop if string]
        self._ids: list[int] = []
        self._decoded = ""
        self.text = ""
        self.stopped = False

    @property
    def num_tokens(self) -> int:
        return len(self._ids)

    def push(self, token_ids: Sequence[int]) -> str:
        """Takes new tokens and returns the text that may be shown now; tokens behind a stop string are dropped."""
        shown_before = len(self.text)
        for token_id in token_ids:
            if self.stopped:
                break
            self._ids.append(int(token_id))
            piece = self._decoder.step(self._core, int(token_id))
            if piece:
                self._extend(piece)
        return self.text[shown_before:]

    def close(self) -> str:
        """Returns what was held back, incomplete characters as U+FFFD; to be called once, at the end."""
        if self.stopped:
            return ""
        shown_before = len(self.text)
        whole = self._core.decode(self._ids, skip_special_tokens=True)
        if whole.startswith(self._decoded):
            self._extend(whole[len(self._decoded) :])
        if not self.stopped:
            self.text = self._decoded
        return self.text[shown_before:]

    def _extend(self, piece: str) -> None:
        # A stop string that was not complete before can only end within the new piece.
        search_from = max(0, len(self._decoded) - max((len(string) for string in self._stop), default=1) + 1)
        self._decoded += piece
        found = [at for string in self._stop if (at := self._decoded.find(string, search_from)) >= 0]
        if found:
            self._decoded = self._decoded[: min(found)]
            self.text = self._decoded
            self.stopped = True
            return
        self.text = self._decoded[: len(self._decoded) - self._held_back()]

    def _held_back(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        longest = max((len(string) for string in self._stop), default=1) - 1
        for size in range(min(longest, len(self._decoded)), 0, -1):
            if any(string.startswith(self._decoded[-size:]) for string in self._stop):
                return size
        return 0
