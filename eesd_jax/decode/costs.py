"""What a round costs, as controllers that weigh drafts against time take it. Measuring it is left to `engine/timing.py`."""

from typing import NamedTuple


class RoundCosts(NamedTuple):
    """Seconds of a round with 0, 1, ... max_draft drafts. exit: of the exit branch. look_up: from lookup; empty where there is none."""

    exit: tuple[float, ...]
    look_up: tuple[float, ...]
