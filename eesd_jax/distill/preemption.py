"""SIGTERM, by which machines are taken back: every process is to learn of it at the same step, so that all save the same state.

One process notes the signal itself. Of several, JAX tells all when one of them gets it, and finds a step that none has passed
(`jax.experimental.multihost_utils.reached_preemption_sync_point`).
"""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils

STOPPED_BY_SIGNAL = 128 + signal.SIGTERM


@contextlib.contextmanager
def watch_for_sigterm() -> Iterator[Callable[[int], bool]]:
    """A function that says whether to stop behind a step; to be asked behind every one. Until the context ends the signal does no more."""
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    received: list[int] = []

    def should_stop(done: int) -> bool:
        del done
        return bool(received)

    if threading.current_thread() is not threading.main_thread():
        yield should_stop  # who called us handles signals
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        yield should_stop
    finally:
        signal.signal(signal.SIGTERM, before)
