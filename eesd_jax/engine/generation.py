"""What a prompt gave: text, tokens, and what every round of speculation did."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # it imports JAX, which a command with a mistake in its flags does without
    from eesd_jax.decode.state import RoundLog

_COUNTS, _BELIEF = ("drafted", "accepted", "committed"), ("alpha", "beta")


@dataclasses.dataclass(frozen=True)
class Rounds:
    """One row's rounds, as arrays of one entry a round, cut where the text was cut.

    Attributes:
      drafted: tokens drafted, those behind the end of the text included (their cost was paid).
      accepted: drafts that became text.
      committed: tokens that became text: accepted + 1, or accepted where the text ended within the drafts, or accepted + 2 where another
        candidate stood in for a refused draft.
      alpha, beta: the controller's posterior of the acceptance of a draft before the round, Beta(alpha, beta); NaN where it has none, as by
        default.
      looked_up: whether the drafts came from lookup in the text, not from the exit branch; none by default.
    """

    drafted: np.ndarray
    accepted: np.ndarray
    committed: np.ndarray
    alpha: np.ndarray | None = None
    beta: np.ndarray | None = None
    looked_up: np.ndarray | None = None

    def __post_init__(self):
        for name in _BELIEF:
            if getattr(self, name) is None:
                object.__setattr__(self, name, np.full(len(self.drafted), np.nan))
        if self.looked_up is None:
            object.__setattr__(self, "looked_up", np.zeros(len(self.drafted), bool))

    @classmethod
    def of_row(cls, log: "RoundLog", row: int) -> "Rounds":
        """Takes one row of a log that was fetched."""
        return cls(**{name: getattr(log, name)[row, : log.rounds[row]] for name in cls._names()})

    @classmethod
    def plain(cls, num_tokens: int) -> "Rounds":
        """Plain decoding: a round a token, nothing drafted."""
        zeros = np.zeros(num_tokens, np.int64)
        return cls(drafted=zeros, accepted=zeros, committed=zeros + 1)

    @classmethod
    def join(cls, parts: Sequence["Rounds"]) -> "Rounds":
        """The rounds of several rows, one after the other."""
        if not parts:
            return cls.plain(0)
        return cls(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in cls._names()})

    @classmethod
    def from_json(cls, values: dict[str, list]) -> "Rounds":
        """What `to_json` was made of."""
        types = dict.fromkeys(_COUNTS, np.int64) | dict.fromkeys(_BELIEF, np.float64) | {"looked_up": bool}
        return cls(**{name: np.array(values[name], types[name]) for name in cls._names() if name in values})  # None becomes NaN

    def to_json(self) -> dict[str, list[Any]]:
        """Lists; a belief to five digits, left out where there is none; `looked_up` as 0 and 1, left out where there was no lookup."""
        values = {name: getattr(self, name).tolist() for name in _COUNTS}
        if np.isfinite(self.alpha).any():
            values |= {name: [None if np.isnan(x) else float(f"{x:.5g}") for x in getattr(self, name)] for name in _BELIEF}
        return values | ({"looked_up": self.looked_up.astype(int).tolist()} if self.looked_up.any() else {})

    @classmethod
    def _names(cls) -> list[str]:
        return [field.name for field in dataclasses.fields(cls)]

    @property
    def mean(self) -> np.ndarray:
        """The expected acceptance of a draft before each round; NaN where the controller has no such belief."""
        return self.alpha / (self.alpha + self.beta)

    def interval(self, probability: float) -> tuple[np.ndarray, np.ndarray]:
        """Bounds between which the acceptance lies with that probability, as the controller believes before each round; NaN as in `mean`.

        It is as probably below the lower one as above the upper one.
        """
        from scipy import special

        tail = (1 - probability) / 2
        return special.betaincinv(self.alpha, self.beta, tail), special.betaincinv(self.alpha, self.beta, 1 - tail)

    def cut(self, num_tokens: int) -> "Rounds":
        """The rounds that gave the first `num_tokens` tokens; the last of them counts for as many as it gave of those."""
        if num_tokens == 0:
            return self._first(0)
        first = self._first(int(np.searchsorted(np.cumsum(self.committed), num_tokens)) + 1)
        committed = first.committed.copy()
        committed[-1] -= committed.sum() - num_tokens
        return dataclasses.replace(first, accepted=np.minimum(first.accepted, committed), committed=committed)

    def _first(self, count: int) -> "Rounds":
        return Rounds(**{name: getattr(self, name)[:count] for name in self._names()})

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
