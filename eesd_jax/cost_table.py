"""What a round costs: seconds of a round with 0, 1, ... max_draft drafts, timed once a machine and shape, and kept.

Speculation pays by the ratio of these to each other, which differs from machine to machine; kept values also make a seed reproduce.
"""

import hashlib
import json
import math
import os
import pathlib
import statistics
import tempfile
import time
import warnings
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from eesd_jax.config import SamplingConfig
from eesd_jax.decode.controllers import Forced
from eesd_jax.weights import hub

if TYPE_CHECKING:
    from eesd_jax.engine import Engine

PROMPT_TOKENS = 32
ROUNDS = 4  # timed together
REPEATS = 5  # of which the median counts


def round_costs(engine: "Engine", batch: int) -> tuple[float, ...]:
    """Seconds of a round with 0, 1, ... max_draft drafts for `batch` rows, from the user's cache or measured now (some seconds).

    A file that cannot be read, or does not hold as many positive numbers, is measured again and replaced. A cache folder that cannot be
    written to is warned of.
    """
    shape = _shape(engine, batch)
    path = hub.cache_dir() / "costs" / f"{hashlib.sha256(shape.encode()).hexdigest()[:16]}.json"
    costs = _read(path, engine.drafter.draft.max_draft + 1)
    if costs is None:
        costs = measure(engine, batch)
        _write(path, {"seconds": costs, "shape": shape})
    return costs


def measure(engine: "Engine", batch: int) -> tuple[float, ...]:
    """Times rounds of the real program, greedy, with the number of drafts forced.

    Lengths take turns, so that a drift of the machine's speed does not favour one.
    """
    endless = type(engine)(engine.model._replace(eos_ids=()), engine.decode_config, engine.drafter)
    max_draft = engine.drafter.draft.max_draft
    prompts = [[i % engine.model.config.vocab_size for i in range(1, PROMPT_TOKENS + 1)]] * batch
    times: list[list[float]] = [[] for _ in range(max_draft + 1)]
    for repeat in range(REPEATS + 1):
        for drafts in range(max_draft + 1):
            state = endless.prefill(prompts, [0] * batch, batch, _budget(engine), Forced())
            state = state._replace(draft=state.draft._replace(controller=jnp.full(batch, drafts, jnp.int32)))
            jax.block_until_ready(state)
            start = time.perf_counter()
            jax.block_until_ready(endless.decode(state, SamplingConfig(), Forced(), ROUNDS))
            if repeat > 0:  # the first time compiles
                times[drafts].append((time.perf_counter() - start) / ROUNDS)
    return tuple(statistics.median(values) for values in times)


def _budget(engine: "Engine") -> int:
    """New tokens of the texts on which rounds are timed: as many as will be generated, so that caches are as long."""
    return max(engine.decode_config.max_new_tokens, ROUNDS * (engine.drafter.draft.max_draft + 1) + 1)


def _shape(engine: "Engine", batch: int) -> str:
    """Everything that the cost of a round depends on."""
    from eesd_jax.engine import bucket_shapes  # which imports this module

    device, model, drafter = jax.devices()[0], engine.model, engine.drafter
    longest_text = min(PROMPT_TOKENS + _budget(engine), model.config.context_length) + drafter.draft.max_draft + 1
    embed, head = model.params["embed"], drafter.branch.head
    return repr(
        (
            device.device_kind,
            os.cpu_count(),
            jax.__version__,
            model.config,
            str(embed.dtype),
            len(embed.sharding.device_set),
            drafter.draft,
            head.shape,
            str(head.dtype),
            batch,
            bucket_shapes(engine.decode_config, PROMPT_TOKENS, longest_text),
        )
    )


def _read(path: pathlib.Path, count: int) -> tuple[float, ...] | None:
    """The `count` costs that a file holds, or None where it does not."""
    try:
        costs = json.loads(path.read_text(encoding="utf-8"))["seconds"]
    except (OSError, ValueError, TypeError, LookupError):
        return None
    if not isinstance(costs, list) or len(costs) != count:
        return None
    return tuple(costs) if all(isinstance(cost, float) and 0 < cost < math.inf for cost in costs) else None


def _write(path: pathlib.Path, content: dict[str, object]) -> None:
    """Writes a file that appears only when whole."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            partial = pathlib.Path(folder) / path.name
            partial.write_text(json.dumps(content), encoding="utf-8")
            partial.replace(path)
    except OSError as error:
        warnings.warn(f"what rounds cost is not kept, and will be measured at every start: {str(path)!r} ({error})", stacklevel=2)
