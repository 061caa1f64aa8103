"""Counts what XLA compiles.

with compiled.programs() as counts:
    engine.generate_ids(...)
assert counts["_decode_plain"] == 1
"""

import collections
import contextlib
import re
from collections.abc import Iterator
from typing import Any

import jax


@contextlib.contextmanager
def programs() -> Iterator[collections.Counter[str]]:
    """How often each jitted function is compiled, or taken from the cache on disk, by its name; nothing is warm at the start."""
    counts: collections.Counter[str] = collections.Counter()

    def listen(event: str, seconds: float, *, fun_name: str = "", **details: Any) -> None:
        del seconds, details
        if event == "/jax/core/compile/backend_compile_duration":
            counts[re.sub(r"^jit\((.*)\)$", r"\1", fun_name)] += 1

    jax.clear_caches()
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield counts
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
