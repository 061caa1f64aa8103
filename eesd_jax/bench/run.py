"""Runs controllers side by side on the same prompts, and keeps every finished run, so that a killed benchmark goes on where it stopped.

Every turn of every conversation is answered once by each controller, all of them from the same prompt: its history holds plain decoding's
answers. Controllers take turns prompt by prompt, in an order that rotates, so that a drift of the machine's speed favours none of them.
Conversations of one category share batches, so that a batch's time belongs to a category.

The time is that of `Engine.generate_ids`, from prompt to text. A run in which JAX compiled anything is thrown away and repeated, so times
never include compilation. Tables are left to `report.py`, plots to `plots.py`.
"""

import contextlib
import functools
import itertools
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from eesd_jax.bench.record import EXCUSED_GAP, Answer, Costs, Divergence, Journal, Run
from eesd_jax.cluster.hardware import cpu_name
from eesd_jax.decode.controllers import PLAIN, Controller
from eesd_jax.decode.state import DecodeState
from eesd_jax.engine import timing
from eesd_jax.engine.conversations import Options, encode
from eesd_jax.engine.engine import Engine
from eesd_jax.engine.prompts import Conversation
from eesd_jax.errors import UserError
from eesd_jax.model import llama, stored
from eesd_jax.model.config import ModelConfig

UNCATEGORIZED = "uncategorized"
_ATTEMPTS = 3
_PLAIN_STEPS = 16  # timed together
_PLAIN_PAIRS = 28  # plain steps and rounds in turns: short turns, since a machine's speed changes within seconds


class Batch(NamedTuple):
    """category: of all its conversations. conversations: by their place in the file."""

    category: str
    conversations: dict[int, Conversation]

    @property
    def turns(self) -> int:
        return max(len(conversation.turns) for conversation in self.conversations.values())


def make_batches(conversations: Sequence[Conversation], batch_size: int) -> list[Batch]:
    """Makes batches of up to `batch_size` conversations of one category, in the order of the file."""
    categories: dict[str, list[int]] = {}
    for place, conversation in enumerate(conversations):
        categories.setdefault(conversation.category or UNCATEGORIZED, []).append(place)
    return [
        Batch(category, {place: conversations[place] for place in chosen})
        for category, places in categories.items()
        for chosen in (places[first : first + batch_size] for first in range(0, len(places), batch_size))
    ]


def run_all(
    engine: Engine,
    batches: Sequence[Batch],
    controllers: dict[str, Controller | None],
    options: Options,
    journal: Journal,
    warn: Callable[[str], None],
) -> Iterator[Run]:
    """Runs what the journal lacks and writes it there; yields every run, also those done before.

    Args:
      controllers: by name; `plain` (None) is among them.
      warn: told of conversations that no longer fit into the model's context.
    """
    done = {(run.batch, run.turn, run.controller): run for run in journal.runs()}
    compared = journal.compared()
    names, rotation = list(controllers), itertools.count()
    with watch_compilation() as compilations:
        for index, batch in enumerate(batches):
            histories = {place: list(conversation.history) for place, conversation in batch.conversations.items()}
            for turn in range(batch.turns):
                prompts = next_prompts(engine, batch, histories, turn, options.chat, warn)
                if not prompts:
                    break
                shift = next(rotation) % len(names)
                runs = {}
                for name in names[shift:] + names[:shift]:
                    run = done.get((index, turn, name))
                    if run is None:
                        answers, seconds = _timed(engine, prompts, batch, controllers[name], options, compilations)
                        run = Run(index, turn, name, batch.category, seconds, answers)
                        journal.append("run", run.to_json())
                    runs[name] = run
                    yield run
                if options.sampling.temperature == 0 and (index, turn) not in compared:
                    found = [vars(divergence) for divergence in find_divergences(engine, list(prompts.values()), runs)]
                    journal.append("divergences", {"batch": index, "turn": turn, "found": found})
                for place, answer in zip(prompts, runs[PLAIN].answers, strict=True):
                    histories[place].append({"role": "assistant", "content": answer.text})


def next_prompts(
    engine: Engine, batch: Batch, histories: dict[int, list[dict[str, str]]], turn: int, chat: bool, warn: Callable[[str], None]
) -> dict[int, list[int]]:
    """Encodes a turn's prompts: token ids by place in the file. A conversation that no longer fits loses its history and ends here."""
    prompts = {}
    for place, conversation in batch.conversations.items():
        if turn < len(conversation.turns) and place in histories:
            histories[place].append({"role": "user", "content": conversation.turns[turn]})
            try:
                prompts[place] = encode(engine, histories[place], chat)
            except UserError as error:  # the answers so far have made it too long
                warn(f"prompt {conversation.id!r} is left without answers from turn {turn + 1} on: {error}")
                del histories[place]
    return prompts


def _timed(
    engine: Engine, prompts: dict[int, list[int]], batch: Batch, controller: Controller | None, options: Options, compilations: list[str]
) -> tuple[list[Answer], float]:
    """Answers the prompts: returns the answers, and the wall time of all of them together, without compilation."""
    for _ in range(_ATTEMPTS):
        before = len(compilations)
        generations = engine.generate_ids(
            list(prompts.values()),
            seeds=[options.seed + place for place in prompts],
            sampling=options.sampling,
            batch_size=options.batch_size,
            stop=options.stop,
            controller=controller,
        )
        if len(compilations) == before:
            answers = [
                Answer(batch.conversations[place].id, generation.token_ids, generation.text, generation.finish_reason, generation.log)
                for place, generation in zip(prompts, generations, strict=True)
            ]
            return answers, max(generation.seconds for generation in generations)
    raise AssertionError(f"{_ATTEMPTS} runs of the same shapes, and each of them compiled something: {compilations[before:]}")


@contextlib.contextmanager
def watch_compilation() -> Iterator[list[str]]:
    """Gives a list that grows by an entry whenever JAX traces or compiles something, or takes it from its cache on disk."""
    seen = []

    def listen(event: str, seconds: float, **details: Any) -> None:
        del seconds, details
        if event.startswith("/jax/core/compile/"):
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def find_divergences(engine: Engine, prompts: Sequence[Sequence[int]], runs: dict[str, Run]) -> list[Divergence]:
    """Finds where the greedy answers of one turn of a batch first differ from plain decoding's."""
    found = []
    for name, run in runs.items():
        for prompt, ours, plain in zip(prompts, run.answers, runs[PLAIN].answers, strict=True):
            if ours.token_ids == plain.token_ids:
                continue
            pairs = itertools.zip_longest(plain.token_ids, ours.token_ids)
            position, tokens = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
            logits = next_logits(engine, [*prompt, *plain.token_ids[:position]])
            second, best = np.sort(logits)[-2:]
            tied = None not in tokens and all(best - logits[token] < EXCUSED_GAP for token in tokens)
            excused = bool(tied) and engine.model.params["final_norm"].dtype == jnp.float32
            found.append(Divergence(name, run.category, ours.id, run.turn, position, float(best - second), excused))
    return found


def next_logits(engine: Engine, tokens: Sequence[int]) -> np.ndarray:
    """Computes the target's logits after `tokens`, float32 [V], in a pass as plain decoding makes it."""
    state = engine.prefill([tokens], [0], 1, 1)
    return np.asarray(_last_logits(engine.model.config, engine.model.params, state))


@functools.partial(jax.jit, static_argnames=("config",))
def _last_logits(config: ModelConfig, params: llama.Params, state: DecodeState) -> jax.Array:
    start_B = state.length - 1
    x = llama.embed(params, jnp.take_along_axis(state.tokens, start_B[:, None], axis=1))
    x, _ = llama.forward_blocks(config, params["blocks"], x, start_B, state.cache, range(config.num_layers))
    return llama.logits(config, params, x)[0, 0]


def measure_costs(engine: Engine, batch: int) -> Costs:
    """Times rounds and a plain step; the plain step in turns with a round that drafts nothing, and relative to it."""
    costs = timing.round_costs(engine, batch)
    timed, forced = timing.endless(engine), timing.forced(engine, 0)
    budget = max(engine.decode_config.max_new_tokens, _PLAIN_STEPS + 2)
    rows = {controller: timing.beginning(timed, controller, batch, budget) for controller in (None, forced)}
    ratios = []
    for pair in range(_PLAIN_PAIRS + 1):
        turns = (None, forced) if pair % 2 else (forced, None)
        seconds = {controller: timing.seconds_of_step(timed, rows[controller], controller, _PLAIN_STEPS) for controller in turns}
        ratios.append(seconds[None] / seconds[forced])
    return Costs(costs.exit[0] * statistics.median(ratios[1:]), costs.exit, costs.look_up)  # the first pair compiles


def describe_machine(engine: Engine) -> dict[str, Any]:
    """Describes the machine that speeds were measured on, without names of hosts or paths."""
    devices = jax.devices()
    return {
        "device": devices[0].device_kind,
        "devices": len(engine.model.params["final_norm"].devices()),
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "jax": jax.__version__,
        "dtype": str(engine.model.params["final_norm"].dtype),
        "reads_codes": stored.has_codes(engine.params),
    }
