"""What a round costs: seconds of a round with 0, 1, ... max_draft drafts, timed once a machine and shape, and kept.

Speculation pays by the ratio of these to each other, which differs from machine to machine; kept values also make a seed reproduce.
"""

import dataclasses
import functools
import hashlib
import json
import math
import os
import pathlib
import statistics
import time
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

import eesd_jax
from eesd_jax import files
from eesd_jax.cluster import processes
from eesd_jax.cluster.hardware import cpu_name
from eesd_jax.config import SamplingConfig
from eesd_jax.decode.controllers import Controller, ControllerSpec, Fixed
from eesd_jax.decode.costs import RoundCosts
from eesd_jax.decode.state import DecodeState
from eesd_jax.engine.prefill import bucket_shapes
from eesd_jax.model import sharding
from eesd_jax.weights import hub

if TYPE_CHECKING:
    from eesd_jax.engine.engine import Engine

PROMPT_TOKENS = 32
ROUNDS = 8  # timed together, behind one that is not: starting a program costs as much as some rounds do
REPEATS = 7  # of which the median counts


def round_costs(engine: "Engine", batch: int) -> RoundCosts:
    """What rounds of `batch` rows cost, from the user's cache or measured now (some seconds).

    A file that cannot be read, or does not hold as many positive numbers, is measured again and replaced. A cache folder that cannot be
    written to is warned of.
    """
    shape = _shape(engine, batch)
    path = hub.cache_dir() / "costs" / f"{hashlib.sha256(shape.encode()).hexdigest()[:16]}.json"
    draft = engine.drafter.draft
    counts = RoundCosts(draft.max_draft + 1, draft.max_draft + 1 if draft.longest_match else 0)
    costs = _agreed(_read(path, counts), engine)
    if costs is None:
        costs = _agreed(measure(engine, batch), engine)
        _write(path, costs._asdict() | {"shape": shape})
    return costs


def _agreed(costs: RoundCosts | None, engine: "Engine") -> RoundCosts | None:
    """Those of process 0, where several decode together: by their own they would choose other lengths, and wait for each other for ever."""
    mesh = sharding.mesh_of(engine.params["final_norm"])
    if mesh is None or not mesh.is_multi_process:
        return costs
    values = processes.exchange(costs)[0]
    return values and RoundCosts(*(tuple(of_kind) for of_kind in values))


def endless(engine: "Engine") -> "Engine":
    """The same engine, whose texts end by nothing but their budget; of its programs none is compiled anew."""
    no_token = -1
    return type(engine)(engine.model._replace(eos_ids=(no_token,) * len(engine.model.eos_ids)), engine.decode_config, engine.drafter)


def forced(engine: "Engine", drafts: int) -> Controller:
    """Drafts so many tokens, of the branch, or, where it is negative, of lookup, right or wrong.

    Where lookup drafts it is the controller `cost_aware`, so that what is compiled to measure is there when texts are generated.
    """
    drafter = engine.drafter
    if not drafter.has_lookup:
        return Fixed(drafts)
    any_costs = (1.0,) * (drafter.draft.max_draft + 1)
    arms = drafter.controller(ControllerSpec("cost_aware"), RoundCosts(any_costs, any_costs))
    return dataclasses.replace(arms, forced=drafts)


def beginning(timed: "Engine", controller: Controller | None, batch: int, budget: int) -> DecodeState:
    """Rows from which steps are timed; without a controller, plain ones.

    Args:
      timed: an `endless` engine.
      controller: any of a kind; what is drafted does not depend on it yet.
      budget: new tokens that there is room for.
    """
    prompts = [[i % timed.model.config.vocab_size for i in range(1, PROMPT_TOKENS + 1)]] * batch
    return timed.prefill(prompts, [0] * batch, batch, budget, controller)


def seconds_of_step(timed: "Engine", rows: DecodeState, controller: Controller | None, steps: int) -> float:
    """Seconds of a round of the real program, greedy; without a controller, of a plain step.

    Args:
      timed: an `endless` engine.
      rows: its `beginning`, which is left as it is.
      steps: timed together, behind one that is not.
    """
    state = jax.tree.map(jnp.copy, rows)  # decoding uses it up
    state = jax.block_until_ready(timed.decode(state, SamplingConfig(), controller, 1))
    start = time.perf_counter()
    jax.block_until_ready(timed.decode(state, SamplingConfig(), controller, steps))
    return (time.perf_counter() - start) / steps


def measure(engine: "Engine", batch: int) -> RoundCosts:
    """Times rounds with the number of drafts forced.

    Looked-up drafts cost nothing but the width of a pass, so of those that one width holds only the most are timed. Without a branch its
    costs are those of a round without drafts.
    """
    timed, draft = endless(engine), engine.drafter.draft
    lengths = range(draft.max_draft + 1)
    by_branch = [] if engine.drafter.branch is None else [length for length in lengths if length]
    look_up = [1 - draft.width_of(length) for length in lengths if length] if draft.longest_match else []  # negative: from lookup
    controllers = {length: forced(engine, length) for length in (0, *by_branch, *look_up)}

    rows = beginning(timed, controllers[0], batch, _budget(engine))

    def seconds(length: int) -> float:
        return seconds_of_step(timed, rows, controllers[length], ROUNDS)

    order = [*controllers, 0]
    seconds(0)  # compiles
    costs = combine(order, [[seconds(length) for length in order] for _ in range(REPEATS)])
    exits = tuple(costs[length] if by_branch else costs[0] for length in lengths)
    return RoundCosts(exits, (costs[0], *(costs[length] for length in look_up)) if draft.longest_match else ())


def combine(order: Sequence[int], times: Sequence[Sequence[float]]) -> dict[int, float]:
    """Seconds of each kind of round, from those of several repeats, in which they take turns.

    Other work on the machine makes all of it slower for a while. So each repeat begins and ends with the same kind, and what counts is the
    median of the ratios to the mean of these two.

    Args:
      order: the kinds, the first of them once more at the end.
      times: of each repeat, seconds of each in that order.
    """
    ends = [math.sqrt(repeat[0] * repeat[-1]) for repeat in times]
    unit = statistics.median(ends)
    ratios = {kind: [repeat[i] / end for repeat, end in zip(times, ends, strict=True)] for i, kind in enumerate(order[:-1])}
    return {kind: unit * statistics.median(values) for kind, values in ratios.items()} | {order[0]: unit}


@functools.cache
def code_fingerprint() -> str:
    """Of all code that decodes, and of what times it: what was timed with other code says nothing of this one."""
    return hashlib.sha256(b"".join(file.read_bytes() for file in code_files())).hexdigest()[:16]


def code_files() -> list[pathlib.Path]:
    """Files of `code_fingerprint`: rooms whole, with the folders in them."""
    package = pathlib.Path(eesd_jax.__file__).parent
    return sorted(file for room in ("model", "kernels", "decode", "engine") for file in (package / room).rglob("*.py"))


def _budget(engine: "Engine") -> int:
    """New tokens of the texts on which rounds are timed: as many as will be generated, so that caches are as long."""
    return max(engine.decode_config.max_new_tokens, (ROUNDS + 1) * (engine.drafter.draft.max_draft + 1) + 1)


def _shape(engine: "Engine", batch: int) -> str:
    """Everything that the cost of a round depends on."""
    device, model, drafter = jax.devices()[0], engine.model, engine.drafter
    longest_text = min(PROMPT_TOKENS + _budget(engine), model.config.context_length) + drafter.draft.max_draft + 1
    mesh = sharding.mesh_of(engine.params["final_norm"])
    weights = jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), (engine.params, engine.branch))
    return repr(
        (
            code_fingerprint(),
            device.device_kind,
            cpu_name(),
            os.cpu_count(),
            jax.__version__,
            model.config,
            None if mesh is None else dict(mesh.shape),
            drafter.draft,
            drafter.ngrams is not None,
            weights,
            batch,
            bucket_shapes(engine.decode_config, PROMPT_TOKENS, longest_text),
        )
    )


def _read(path: pathlib.Path, counts: RoundCosts) -> RoundCosts | None:
    """The costs that a file holds, or None where it does not hold as many."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        costs = RoundCosts(*(content[name] for name in RoundCosts._fields))
    except (OSError, ValueError, TypeError, LookupError):
        return None
    if not all(isinstance(values, list) and len(values) == count for values, count in zip(costs, counts, strict=True)):
        return None
    if not all(isinstance(cost, float) and 0 < cost < math.inf for values in costs for cost in values):
        return None
    return RoundCosts(*(tuple(values) for values in costs))


def _write(path: pathlib.Path, content: dict[str, object]) -> None:
    """Keeps costs, if that can be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_whole(path, json.dumps(content))
    except OSError as error:
        warnings.warn(f"what rounds cost is not kept, and will be measured at every start: {str(path)!r} ({error})", stacklevel=2)
