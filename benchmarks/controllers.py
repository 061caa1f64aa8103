"""Plays controllers on synthetic texts: tokens per unit of cost, relative to the best fixed length and to a clairvoyant.

    python benchmarks/controllers.py --cost=cpu
    python benchmarks/controllers.py --cost=gpu --json=result.json
    python benchmarks/controllers.py --cost=1,1.1,1.2,1.3 --controllers=beta,cost_aware --discount=0.8

The controllers are the real ones; only the text is simulated. At every position the draft is accepted with some probability, if all before
it are right, and has some confidence. Outcomes belong to positions, not to rounds, so every controller meets the same text. The cost
vector says what a round costs, by the longest draft in its batch. The best fixed length is found by a sweep for each process; the
clairvoyant drafts up to the first rejection and never a token more.

Axes: G games (batches, of all processes together), B rows of a batch, T positions, K drafts.
"""

import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table

from eesd_jax import cli, files
from eesd_jax.config import ControllerConfig
from eesd_jax.decode.controllers import Calibration, Controller, Fixed, Offer, Outcome, Setup, build_controller, parse_controller
from eesd_jax.decode.costs import RoundCosts
from eesd_jax.errors import UserError

FLAGS = flags.FLAGS
flags.DEFINE_string("cost", "cpu", "cpu, dear, gpu, a list such as 1,1.1,1.3, or a JSON file of a list: a round with 0, 1, ... drafts.")
flags.DEFINE_string("controllers", "threshold:0.6,beta,beta:plain,calibrated,cost_aware", "Controllers to compare.")
flags.DEFINE_integer("prompts", 128, "Prompts of each process; a multiple of --batch_size.")
flags.DEFINE_integer("tokens", 256, "Tokens generated from each prompt.")
flags.DEFINE_integer("batch_size", 1, "Rows that are decoded together.")
flags.DEFINE_integer("seed", 0, "Of texts and controllers.")
flags.DEFINE_string("json", None, "File to write the result to.")
for field in dataclasses.fields(ControllerConfig):
    flags.DEFINE_float(field.name, field.default, "Of the learning controllers; see ControllerConfig.")

COSTS = {
    # Milliseconds, measured on 2 CPU cores: the built-in model, float32, batch 1, N = 4, a draft vocabulary of 8192 (docs/decoder.md).
    "cpu": (7.78, 10.93, 12.77, 16.50, 18.32, 24.87, 26.04, 27.73, 28.61),
    # The same machine when XLA did these products, and the branch drafted from the whole vocabulary: drafting is dear.
    "dear": (26.4, 49.9, 61.0, 70.0, 79.6, 88.6, 95.8, 108.3, 116.0),
    # An assumption, not a measurement: a pass is bound by reading the weights, so that verifying 9 tokens costs what one does, and a draft
    # reads a twelfth of them.
    "gpu": tuple(1 + 0.08 * drafts for drafts in range(9)),
}


class Text(NamedTuple):
    """A simulated text: the outcome of drafting at every position, [..., T] each.

    accepted: bool, the draft of this position is accepted if all before it were. confidence: float32, the branch's probability of it.
    """

    accepted: jax.Array
    confidence: jax.Array


class Played(NamedTuple):
    """Sums over the rounds of a batch, float32 each: cost and tokens, rounds (of all rows), tokens drafted and accepted."""

    cost: jax.Array
    tokens: jax.Array
    rounds: jax.Array
    drafted: jax.Array
    accepted: jax.Array


# --- Processes: from a generator and a shape [prompts, T] to (probability of acceptance, confidence) ---

Process = Callable[[np.random.Generator, tuple[int, int]], tuple[np.ndarray, np.ndarray]]


def _uninformative(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    return rng.beta(8.0, 4.0, shape)  # about 2/3, whatever becomes of the draft


def constant(acceptance: float) -> Process:
    """Makes acceptance the same everywhere; the confidence says nothing."""
    return lambda rng, shape: (np.full(shape, acceptance), _uninformative(rng, shape))


def per_prompt(rng: np.random.Generator, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Makes acceptance constant within a prompt, anything from 0.2 to 0.95; the confidence says nothing."""
    return np.broadcast_to(rng.uniform(0.2, 0.95, (shape[0], 1)), shape), _uninformative(rng, shape)


def ramp(first: float, last: float) -> Process:
    """Makes acceptance drift evenly over the text; the confidence says nothing."""
    return lambda rng, shape: (np.broadcast_to(np.linspace(first, last, shape[1]), shape), _uninformative(rng, shape))


def late(rng: np.random.Generator, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Makes a quarter of the text hopeless (0.1), the rest easy (0.95): who gave up must notice. The confidence says nothing."""
    return np.broadcast_to(np.where(np.arange(shape[1]) < shape[1] // 4, 0.1, 0.95), shape), _uninformative(rng, shape)


def switching(rng: np.random.Generator, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Makes stretches of easy (0.92) and of hard text (0.35), 32 tokens long on average; the confidence says nothing."""
    switches = rng.random(shape) < 1 / 32
    easy = (np.cumsum(switches, axis=1) + rng.integers(2, size=(shape[0], 1))) % 2
    return np.where(easy, 0.92, 0.35), _uninformative(rng, shape)


def confident(spread_of_prompts: float, slope: float, intercept: float, noise: float = 0.0) -> Process:
    """Draws every token's acceptance, mostly easy or hopeless: logit(acceptance) ~ Normal(1.4 + the prompt's own offset, 2.4).

    Args:
      spread_of_prompts: standard deviation of the prompts' offsets.
      slope, intercept: logit(confidence) = slope * logit(acceptance) + intercept; 1 and 0 are calibrated.
      noise: standard deviation of the noise that is added to logit(confidence).
    """

    def process(rng: np.random.Generator, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        logit = rng.normal(1.4, 2.4, shape) + rng.normal(0, 1, (shape[0], 1)) * spread_of_prompts
        return _sigmoid(logit), _sigmoid(slope * logit + intercept + noise * rng.normal(0, 1, shape))

    return process


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


PROCESSES: dict[str, Process] = {
    "constant 0.3": constant(0.3),
    "constant 0.5": constant(0.5),
    "constant 0.7": constant(0.7),
    "constant 0.8": constant(0.8),
    "constant 0.9": constant(0.9),
    "per prompt, 0.2 to 0.95": per_prompt,
    "falling, 0.95 to 0.3": ramp(0.95, 0.3),
    "rising, 0.3 to 0.95": ramp(0.3, 0.95),
    "0.1, then 0.95": late,
    "switching, 0.92 and 0.35": switching,
    "confidence": confident(0.0, 1.0, 0.0),
    "confidence, prompts differ": confident(1.2, 1.0, 0.0),
    "confidence, noisy": confident(0.7, 0.8, 0.0, noise=1.0),
    "confidence, overconfident": confident(0.7, 1.6, 1.5),
}


def make_texts(seed: int, prompts: int, tokens: int) -> Text:
    """Makes the texts of every process, [processes, prompts, tokens]."""
    accepted, confidence = [], []
    for index, process in enumerate(PROCESSES.values()):
        rng = np.random.default_rng([seed, index])
        probability, sure = process(rng, (prompts, tokens))
        accepted.append(rng.random((prompts, tokens)) < probability)
        confidence.append(sure)
    return Text(jnp.array(accepted), jnp.array(confidence, jnp.float32))


# --- Playing ---


class _Game(NamedTuple):
    """position: int32 [B], tokens committed. state: the controller's. played: so far."""

    position: jax.Array
    state: Any
    played: Played


def play(controller: Controller, state: Any, cost: jax.Array, text: Text, keys_B: jax.Array) -> Played:
    """Decodes one batch [B, T] with a controller from its initial `state`, round by round as `decode/round.py` does."""
    batch, tokens = text.accepted.shape
    max_draft = cost.shape[0] - 1

    def play_round(game: _Game) -> _Game:
        running = game.position < tokens
        useful = jnp.where(running, tokens - game.position - 1, 0)
        round_keys = jax.vmap(jax.random.fold_in)(keys_B, game.position)
        plan_keys, decide_keys = jax.vmap(jax.random.split, out_axes=1)(round_keys)

        def ask(carry: tuple[Any, jax.Array], k: jax.Array) -> tuple[tuple[Any, jax.Array], jax.Array]:
            plan, keep = carry  # keep: bool [B]
            last = jnp.take_along_axis(text.confidence, (game.position + k - 1)[:, None], axis=1, mode="clip")[:, 0]
            step_keys = jax.vmap(jax.random.fold_in, (0, None))(decide_keys, k)
            wanted, plan = controller.keep_drafting(step_keys, plan, k, jnp.where(k > 0, last, 1.0))
            keep &= wanted & (k < jnp.minimum(useful, max_draft))
            return (plan, keep), keep

        plan = controller.propose(plan_keys, game.state, Offer(running=running))
        (plan, _), kept_LxB = jax.lax.scan(ask, (plan, running), jnp.arange(max_draft + 1))
        count = jnp.sum(kept_LxB, axis=0)
        accepted = jnp.minimum(count, run_lengths(text.accepted, game.position, max_draft))
        outcome = Outcome(drafted=count, accepted=accepted, replaced=jnp.zeros(batch, bool))
        state = controller.update(game.state, plan, outcome)
        state = jax.tree.map(lambda new, old: jnp.where(running, new, old), state, game.state)
        return _Game(game.position + running * (accepted + 1), state, _add_round(game.played, cost, running, count, accepted))

    start = _Game(jnp.zeros(batch, jnp.int32), state, _nothing_played())
    return jax.lax.while_loop(lambda game: jnp.any(game.position < tokens), play_round, start).played


def play_clairvoyant(cost: jax.Array, text: Text) -> Played:
    """Decodes one batch [B, T] as the clairvoyant does: every row drafts exactly what will be accepted."""
    batch, tokens = text.accepted.shape

    def play_round(game: _Game) -> _Game:
        running = game.position < tokens
        useful = jnp.where(running, tokens - game.position - 1, 0)
        count = jnp.minimum(useful, run_lengths(text.accepted, game.position, cost.shape[0] - 1))
        return _Game(game.position + running * (count + 1), None, _add_round(game.played, cost, running, count, count))

    start = _Game(jnp.zeros(batch, jnp.int32), None, _nothing_played())
    return jax.lax.while_loop(lambda game: jnp.any(game.position < tokens), play_round, start).played


def run_lengths(accepted_BxT: jax.Array, position_B: jax.Array, max_draft: int) -> jax.Array:
    """Counts the drafts in a row that would be accepted from each row's position on, int32 [B], at most max_draft."""
    places = position_B[:, None] + jnp.arange(max_draft)
    ahead_BxK = jnp.take_along_axis(accepted_BxT, places, axis=1, mode="fill", fill_value=False)
    return jnp.sum(jnp.cumprod(ahead_BxK, axis=1), axis=1)


def _nothing_played() -> Played:
    return Played(*(jnp.float32(0) for _ in Played._fields))


def _add_round(played: Played, cost: jax.Array, running: jax.Array, count: jax.Array, accepted: jax.Array) -> Played:
    rows, drafted, accepted = jnp.sum(running), jnp.sum(running * count), jnp.sum(running * accepted)
    return Played(
        played.cost + cost[jnp.max(running * count)],
        played.tokens + rows + accepted,
        played.rounds + rows,
        played.drafted + drafted,
        played.accepted + accepted,
    )


# --- Comparing ---


def games(texts: Text, batch: int) -> Text:
    """Reshapes [processes, prompts, T] to [G, B, T]."""
    return jax.tree.map(lambda field: field.reshape(-1, batch, field.shape[-1]), texts)


def by_process(played: Played) -> Played:
    """Sums over the games [G] of each process, in numpy."""
    return jax.tree.map(lambda field: np.asarray(field).reshape(len(PROCESSES), -1).sum(axis=1), played)


def compare(controllers: dict[str, Controller], cost: tuple[float, ...], texts: Text, batch: int, seed: int) -> dict[str, Played]:
    """Plays every controller, every fixed length (under its int) and the clairvoyant on all texts; sums by process."""
    text_GxBxT, costs = games(texts, batch), jnp.array(cost, jnp.float32)
    keys_GxB = jax.random.split(jax.random.key(seed), text_GxBxT.accepted.shape[:2])

    @jax.jit
    def run(controller: Controller) -> Played:
        return jax.vmap(lambda text, keys: play(controller, controller.init(batch), costs, text, keys))(text_GxBxT, keys_GxB)

    results = {length: run(Fixed(length)) for length in range(len(cost))}
    results |= {name: run(controller) for name, controller in controllers.items()}
    results["clairvoyant"] = jax.jit(jax.vmap(functools.partial(play_clairvoyant, costs)))(text_GxBxT)
    return {name: by_process(played) for name, played in results.items()}


def summarize(results: dict[Any, Played], names: Sequence[str]) -> dict[str, Any]:
    """Turns the result into what JSON holds."""
    lengths = [name for name in results if isinstance(name, int)]
    speed = {name: played.tokens / played.cost for name, played in results.items()}
    best = np.argmax([speed[length] for length in lengths], axis=0)
    best_speed = np.max([speed[length] for length in lengths], axis=0)
    relative = {name: speed[name] / best_speed for name in names}

    def describe(name: str, process: int) -> dict[str, float]:
        played = jax.tree.map(lambda field: float(field[process]), results[name])
        return {
            "relative_to_best_fixed": float(relative[name][process]),
            "relative_to_clairvoyant": float(speed[name][process] / speed["clairvoyant"][process]),
            "tokens_per_round": played.tokens / played.rounds,
            "mean_draft_length": played.drafted / played.rounds,
            "acceptance_rate": played.accepted / max(played.drafted, 1.0),
        }

    return {
        "processes": {
            process: {
                "best_fixed": int(best[i]),
                "best_fixed_speedup": float(best_speed[i] / speed[0][i]),
                "clairvoyant_relative_to_best_fixed": float(speed["clairvoyant"][i] / best_speed[i]),
                "controllers": {name: describe(name, i) for name in names},
            }
            for i, process in enumerate(PROCESSES)
        },
        "geometric_mean": {name: float(np.exp(np.mean(np.log(values)))) for name, values in relative.items()},
        "worst": {name: float(np.min(values)) for name, values in relative.items()},
    }


def show(result: dict[str, Any], names: Sequence[str]) -> None:
    """Prints the table."""
    table = Table(
        title=f"Tokens per unit of cost, relative to the best fixed length (to the clairvoyant); cost={FLAGS.cost}",
        caption="cost=gpu is an assumption, not a measurement" if FLAGS.cost == "gpu" else None,
    )
    for column in ("", "best fixed", *names, "clairvoyant"):
        table.add_column(column, justify="right" if column else "left")
    for process, row in result["processes"].items():
        cells = [
            f"{row['controllers'][name]['relative_to_best_fixed']:.2f} ({row['controllers'][name]['relative_to_clairvoyant']:.2f})"
            for name in names
        ]
        best = f"{row['best_fixed']} = {row['best_fixed_speedup']:.2f} x plain"
        table.add_row(process, best, *cells, f"{row['clairvoyant_relative_to_best_fixed']:.2f}")
    table.add_section()
    for label in ("geometric_mean", "worst"):
        table.add_row(label.replace("_", " "), "", *(f"{result[label][name]:.3f}" for name in names))
    Console().print(table)


# --- The command ---


def cost_from_flag() -> tuple[float, ...]:
    """Reads the cost of a round with 0, 1, ... drafts; also from a cost file of the decoder's own (`engine/timing.py`)."""
    if FLAGS.cost in COSTS:
        return COSTS[FLAGS.cost]
    expected = f"expected {', '.join(COSTS)}, a list of at least two positive numbers, or a JSON file of one"
    try:
        path = pathlib.Path(FLAGS.cost)
        values = json.loads(path.read_text()) if path.is_file() else json.loads(f"[{FLAGS.cost}]")
        cost = tuple(float(value) for value in (values["exit"] if isinstance(values, dict) else values))
    except (OSError, ValueError, TypeError, KeyError):
        raise UserError(f"--cost is {FLAGS.cost!r}; {expected}") from None
    if len(cost) < 2 or not all(0 < value < math.inf for value in cost):
        raise UserError(f"--cost is {FLAGS.cost!r}; {expected}")
    return cost


def main(argv: Sequence[str]) -> None:
    del argv
    for name in ("prompts", "tokens", "batch_size"):
        if FLAGS[name].value < 1:
            raise UserError(f"--{name} is {FLAGS[name].value}; expected an integer >= 1")
    if FLAGS.prompts % FLAGS.batch_size:
        raise UserError(f"--prompts is {FLAGS.prompts}; expected a multiple of --batch_size, which is {FLAGS.batch_size}")
    cost = cost_from_flag()
    settings = ControllerConfig(**{field.name: FLAGS[field.name].value for field in dataclasses.fields(ControllerConfig)})
    specs = {name: parse_controller(name, max_draft=len(cost) - 1) for name in dict.fromkeys(FLAGS.controllers.split(","))}
    # Confidence is taken as it is: whether it is calibrated is what the processes differ in.
    setup = Setup(calibration=Calibration(), costs=RoundCosts(cost, ()), settings=settings)
    built = {name: build_controller(spec, setup) for name, spec in specs.items()}
    controllers = {name: Fixed(0) if controller is None else controller for name, controller in built.items()}
    texts = make_texts(FLAGS.seed, FLAGS.prompts, FLAGS.tokens)
    result = summarize(compare(controllers, cost, texts, FLAGS.batch_size, FLAGS.seed), list(controllers))
    show(result, list(controllers))
    if FLAGS.json:
        flag_names = ("prompts", "tokens", "batch_size", "seed")
        header = {"cost": cost, **{name: FLAGS[name].value for name in flag_names}, "settings": dataclasses.asdict(settings)}
        with files.whole_file(FLAGS.json) as file:
            json.dump(header | result, file, indent=2)


if __name__ == "__main__":
    cli.run(main)
