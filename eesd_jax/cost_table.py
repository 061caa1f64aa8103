"""What a round costs: seconds of a round with 0, 1, ... max_draft drafts, timed once a machine and shape, and kept.

Speculation pays by the ratio of these to each other, which differs from machine to machine; kept values also make a seed reproduce.
"""

import hashlib
import json
import os
import statistics
import tempfile
import time
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from eesd_jax.config import SamplingConfig
from eesd_jax.decode.controllers import Forced
from eesd_jax.weights import hub

if TYPE_CHECKING:
    from eesd_jax.engine import Engine

ROUNDS = 4  # timed together
REPEATS = 5  # of which the median counts


def round_costs(engine: "Engine", batch: int) -> tuple[float, ...]:
    """Seconds of a round with 0, 1, ... max_draft drafts for `batch` rows, from the user's cache or measured now (some seconds).

    Lengths take turns, so that a drift of the machine's speed does not favour one.
    """
    path = hub.cache_dir() / "costs" / f"{_key(engine, batch)}.json"
    if path.exists():
        return tuple(json.loads(path.read_text())["seconds"])
    costs = measure(engine, batch)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        json.dump({"seconds": costs, "shape": _shape(engine, batch)}, file)
    os.replace(file.name, path)
    return costs


def measure(engine: "Engine", batch: int) -> tuple[float, ...]:
    """Times rounds of the real program, greedy, with the number of drafts forced."""
    endless = type(engine)(engine.model._replace(eos_ids=()), engine.decode_config, engine.drafter)
    max_draft = engine.drafter.draft.max_draft
    prompts = [[i % engine.model.config.vocab_size for i in range(1, 33)]] * batch
    longest = ROUNDS * (max_draft + 1)
    times: list[list[float]] = [[] for _ in range(max_draft + 1)]
    for repeat in range(REPEATS + 1):
        for drafts in range(max_draft + 1):
            state = endless.prefill(prompts, [0] * batch, batch, max(longest + 1, 96), Forced())
            state = state._replace(draft=state.draft._replace(controller=jnp.full(batch, drafts, jnp.int32)))
            jax.block_until_ready(state)
            start = time.perf_counter()
            jax.block_until_ready(endless.decode(state, SamplingConfig(), Forced(), ROUNDS))
            if repeat > 0:  # the first time compiles
                times[drafts].append((time.perf_counter() - start) / ROUNDS)
    return tuple(statistics.median(values) for values in times)


def _shape(engine: "Engine", batch: int) -> str:
    """Everything that the cost of a round depends on."""
    device = jax.devices()[0]
    drafter = engine.drafter
    return repr(
        (
            device.device_kind,
            os.cpu_count(),
            jax.__version__,
            engine.model.config,
            drafter.draft,
            drafter.branch.head.shape,
            str(drafter.branch.head.dtype),
            batch,
        )
    )


def _key(engine: "Engine", batch: int) -> str:
    return hashlib.sha256(_shape(engine, batch).encode()).hexdigest()[:16]
