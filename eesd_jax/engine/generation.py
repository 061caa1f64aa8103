"""What a prompt gave: text, tokens, and what every round of speculation did."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Rounds:
    """One row's rounds, as arrays of one entry a round, cut where the text was cut.

    Attributes:
      drafted: tokens drafted, those behind the end of the text included (their cost was paid).
      accepted: drafts that became text.
      committed: tokens that became text: accepted + 1, or accepted where the text ended within the drafts, or accepted + 2 where another
        candidate stood in for a refused draft.
      mean: the controller's expected acceptance of a draft before the round; NaN where it has no such belief.
      looked_up: whether the drafts came from lookup in the text, not from the exit branch; none by default.
    """

    drafted: np.ndarray
    accepted: np.ndarray
    committed: np.ndarray
    mean: np.ndarray
    looked_up: np.ndarray | None = None

    def __post_init__(self):
        if self.looked_up is None:
            object.__setattr__(self, "looked_up", np.zeros(len(self.drafted), bool))

    @classmethod
    def plain(cls, num_tokens: int) -> "Rounds":
        """Plain decoding: a round a token, nothing drafted."""
        zeros = np.zeros(num_tokens, np.int64)
        return cls(zeros, zeros, zeros + 1, np.full(num_tokens, np.nan))

    @classmethod
    def join(cls, parts: Sequence["Rounds"]) -> "Rounds":
        """The rounds of several rows, one after the other."""
        columns = zip(*(part._columns for part in parts), strict=True)
        return cls(*(np.concatenate(column) for column in columns)) if parts else cls.plain(0)

    @classmethod
    def from_json(cls, values: dict[str, list]) -> "Rounds":
        """What `to_json` was made of."""
        counts = (np.array(values[name], np.int64) for name in ("drafted", "accepted", "committed"))
        looked_up = np.array(values["looked_up"], bool) if "looked_up" in values else None
        return cls(*counts, np.array(values["mean"], np.float64), looked_up)  # None becomes NaN

    def to_json(self) -> dict[str, list[Any]]:
        """Lists; a belief to four digits, None for NaN; `looked_up` as 0 and 1, left out where there was no lookup."""
        values = {name: getattr(self, name).tolist() for name in ("drafted", "accepted", "committed")}
        values["mean"] = [None if np.isnan(mean) else round(float(mean), 4) for mean in self.mean]
        return values | ({"looked_up": self.looked_up.astype(int).tolist()} if self.looked_up.any() else {})

    @property
    def _columns(self) -> tuple[np.ndarray, ...]:
        return self.drafted, self.accepted, self.committed, self.mean, self.looked_up

    def cut(self, num_tokens: int) -> "Rounds":
        """The rounds that gave the first `num_tokens` tokens; the last of them counts for as many as it gave of those."""
        if num_tokens == 0:
            return Rounds(*(column[:0] for column in self._columns))
        count = int(np.searchsorted(np.cumsum(self.committed), num_tokens)) + 1
        committed = self.committed[:count].copy()
        committed[-1] -= committed.sum() - num_tokens
        kept = np.minimum(self.accepted[:count], committed)
        return Rounds(self.drafted[:count], kept, committed, self.mean[:count], self.looked_up[:count])

    @property
    def tested(self) -> np.ndarray:
        """Drafts of each round that the text did not end before."""
        return np.where(self.committed <= self.accepted, self.accepted, self.drafted)

    def acceptance_by_position(self) -> np.ndarray:
        """Share of drafts accepted at each place of a round, float64 [longest draft]; a draft behind a rejected one is not accepted."""
        places = np.arange(max(self.tested, default=0))[:, None]
        return np.mean(self.accepted > places, axis=1, where=self.tested > places)

    def accepted_lengths(self) -> np.ndarray:
        """How many rounds accepted 0, 1, 2, ... drafts."""
        return np.bincount(self.accepted)


@dataclasses.dataclass(frozen=True)
class Generation:
    """What one prompt gave.

    Attributes:
      text: without special tokens, cut before a stop string.
      token_ids: new tokens; the last one is the EOS or the token that completed a stop string, where that ended the text.
      prompt_tokens: length of the prompt in tokens.
      finish_reason: "eos", "stop" or "length" (budget or context used up).
      log: what every round (pass of the whole target) did.
      seconds: wall time of the batch that the row was in, compilation included, until this row ended.
      first_token_seconds: wall time until the batch's first token.
    """

    text: str
    token_ids: list[int]
    prompt_tokens: int
    finish_reason: str
    log: Rounds
    seconds: float
    first_token_seconds: float

    @property
    def tokens_per_second(self) -> float:
        return len(self.token_ids) / self.seconds

    @property
    def rounds(self) -> int:
        """Passes of the whole target; the prompt's is not one."""
        return len(self.log.committed)

    @property
    def drafted(self) -> int:
        """Drafts that the text did not end before."""
        return int(self.log.tested.sum())

    @property
    def accepted(self) -> int:
        return int(self.log.accepted.sum())

    @property
    def tokens_per_round(self) -> float:
        return len(self.token_ids) / self.rounds if self.rounds else 0.0
