"""From token ids to text as they come: pieces that never split a multi-byte character, and stop strings."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

_REPLACEMENT = "\ufffd"  # what decoders put for bytes that are no character, or not one yet


class TextStream:
    """Turns the new tokens of one row into text.

    Characters appear once all of their bytes are there, and text that may be the start of a stop string is held back until that is decided.
    The stop string that is complete first ends the text; of several that end at the same place, the longest. So the text does not depend on
    how it is cut into tokens.

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
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()):
        self._core = tokenizer.backend_tokenizer
        self._stop = sorted({string for string in stop if string}, key=len, reverse=True)
        self._ids: list[int] = []
        self._window = 0  # the first token of the window
        self._fresh = 0  # the first token of the window whose text was not complete when the window was moved
        self._known = ""  # text of the window that is in `_decoded`
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
        for end in range(searched + 1, len(self._decoded) + 1) if self._stop else ():
            # Longest first: the start of the text that is cut off is the earliest.
            found = next((string for string in self._stop if self._decoded.endswith(string, 0, end)), None)
            if found is not None:
                self._decoded = self._decoded[: end - len(found)]
                self.text = self._decoded
                self.stopped = True
                return
        self.text = self._decoded[: len(self._decoded) - self._held_back()]

    def _held_back(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        longest = len(self._stop[0]) - 1 if self._stop else 0
        for size in range(min(longest, len(self._decoded)), 0, -1):
            if any(string.startswith(self._decoded[-size:]) for string in self._stop):
                return size
        return 0
