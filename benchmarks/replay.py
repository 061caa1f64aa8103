"""Replays lookup and its bandit on answers that a benchmark has kept: what other lengths, costs, tables or rules would have given.

    python infer/benchmark.py --prompts=questions.jsonl --controllers=cost_aware --output_dir=results
    python benchmarks/replay.py --prompts=questions.jsonl --results=results
    python benchmarks/replay.py --prompts=questions.jsonl --results=results --ngrams=none --cost=1,1.02,1.04,1.06,1.08

No model is run: a looked-up draft has all its probability on one token, so it is accepted where the text goes on with that token, and the
answers of plain decoding say where. At temperature 0 these are the decoder's own rounds; above it they follow the same law. The code is the
decoder's own. Every answer is played as if it were decoded alone. The price of a round is the benchmark's, or `--cost`.

The clairvoyant is offered the same drafts, and drafts up to the first that is rejected and never a token more.

Axes: R answers, S tokens, K drafts.
"""

import functools
import json
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

import eesd_jax
from eesd_jax import cli, files
from eesd_jax.bench import report
from eesd_jax.bench import run as benchmark
from eesd_jax.bench.record import Journal
from eesd_jax.config import LONGEST_MATCH
from eesd_jax.decode.controllers import PLAIN, Calibration, Offer, Outcome, Setup, build_controller, parse_controller
from eesd_jax.decode.costs import RoundCosts
from eesd_jax.decode.sources import lookup, ngrams
from eesd_jax.decode.sources.bandit import Arms
from eesd_jax.engine.engine import Engine
from eesd_jax.engine.prompts import prompts_sha256, read_prompts
from eesd_jax.errors import UserError
from eesd_jax.weights import hub

FLAGS = flags.FLAGS
flags.DEFINE_string("prompts", None, "The prompt file of the benchmark.")
flags.DEFINE_string("results", None, "Its output folder, in which runs.jsonl is.")
flags.DEFINE_list(
    "cost", None, "What rounds with 0, 1, ... drafts cost, a plain step as much as the first; default: as the benchmark measured."
)
flags.DEFINE_string("json", None, "File to write the result to.")
flags.DEFINE_string("model", hub.DEMO_NAME, "The model of the benchmark.")
flags.DEFINE_string("ngrams", "auto", "As for infer/generate.py.")

CLAIRVOYANT = "clairvoyant"
NO_DRAFT = -1  # no token


class Texts(NamedTuple):
    """The answers. tokens: int32 [R, S], prompt and answer, then `NO_DRAFT`. categories: of each.

    start, end, limit: int32 [R], the positions after the prompt, after the answer, and after the longest answer within its budget.
    """

    tokens: jax.Array
    start: jax.Array
    end: jax.Array
    limit: jax.Array
    categories: list[str]


class Played(NamedTuple):
    """Sums for each answer, [R]. rounds, drafted, accepted: int32. price: float32."""

    rounds: jax.Array
    drafted: jax.Array
    accepted: jax.Array
    price: jax.Array


def texts_of(rows: Sequence[tuple[str, Sequence[int], Sequence[int]]], budget: int, max_draft: int) -> Texts:
    """Makes `Texts` of category, prompt and answer of each."""
    tokens = np.full((len(rows), max(len(prompt) + len(answer) for _, prompt, answer in rows) + max_draft + 1), NO_DRAFT, np.int32)
    for row, (_, prompt, answer) in zip(tokens, rows, strict=True):
        row[: len(prompt) + len(answer)] = [*prompt, *answer]
    prompts, answers = (np.array([len(row[i]) for row in rows]) for i in (1, 2))
    counts = (jnp.asarray(count, jnp.int32) for count in (prompts, prompts + answers, prompts + budget))
    return Texts(jnp.asarray(tokens), *counts, [category for category, _, _ in rows])


@functools.partial(jax.jit, static_argnums=0)
def play(arms: Arms | None, texts: Texts, cost_L: jax.Array, entries: jax.Array | None) -> Played:
    """Plays the rounds of all answers side by side until the last one ends; `arms` is None for the clairvoyant."""
    max_draft = cost_L.size - 1
    places_K = jnp.arange(max_draft)
    tokens, start, end, limit = texts[:4]
    truth = jnp.pad(tokens, ((0, 0), (0, max_draft)), constant_values=NO_DRAFT)

    def propose_alone(*row: Any) -> Any:
        state, running, found = jax.tree.map(lambda x: x[None], row)
        plan = arms.propose(jax.random.split(jax.random.key(0), 1), state, Offer(running=running, found=found))
        return jax.tree.map(lambda x: x[0], plan)

    def play_round(carry: tuple[Any, jax.Array, Played]) -> tuple[Any, jax.Array, Played]:
        state, length, played = carry
        running = length < end
        # Tokens beyond a text's length are still unwritten when a round begins.
        found = lookup.look_up(tokens, length, LONGEST_MATCH, max_draft)
        if entries is not None:
            found = ngrams.fill_in(found, entries, tokens, length)
        useful = jnp.where(running, jnp.minimum(limit - length - 1, found.count), 0)
        goes_on = jnp.take_along_axis(truth, length[:, None] + places_K, axis=1)

        def count_right(count: jax.Array) -> jax.Array:
            return jnp.cumprod((goes_on == found.tokens) & (places_K < count[:, None]), axis=1).sum(axis=1)

        if arms is None:
            drafted = count_right(useful)
        else:
            plan = jax.vmap(propose_alone)(state, running, found)
            drafted = jnp.minimum(plan.look_up, useful)
            outcome = Outcome(drafted=drafted, accepted=count_right(drafted), replaced=jnp.zeros(drafted.shape, bool))
            state = arms.update(state, plan, outcome)
        accepted = count_right(drafted)  # nothing beyond the end
        price = jnp.where(running, cost_L[drafted], 0.0)
        played = Played(*(count + seen for count, seen in zip(played, (running, drafted, accepted, price), strict=True)))
        return state, length + jnp.where(running, accepted + 1, 0), played

    zeros = jnp.zeros_like(start)
    begin = None if arms is None else arms.init(start.size), start, Played(zeros, zeros, zeros, zeros.astype(jnp.float32))
    return jax.lax.while_loop(lambda carry: jnp.any(carry[1] < end), play_round, begin)[2]


def controllers(cost: Sequence[float]) -> dict[str, Arms | None]:
    """Lists the bandit, every fixed length, and the clairvoyant."""
    names = ["cost_aware", *(f"fixed:{drafts}" for drafts in range(1, len(cost)))]
    costs = RoundCosts(tuple(cost), tuple(cost))
    setup = Setup(calibration=Calibration(), costs=costs, has_branch=False, has_lookup=True)
    found = {name: build_controller(parse_controller(name, len(cost) - 1), setup) for name in names}
    return found | {CLAIRVOYANT: None}


def summary(played: Played, texts: Texts, plain: float, chosen: np.ndarray) -> dict[str, float]:
    """Sums up the chosen answers: speed-up, tokens of a round, share of drafts that were accepted."""
    rounds, drafted, accepted, price = (float(np.asarray(count)[chosen].sum()) for count in played)
    tokens = float(np.asarray(texts.end - texts.start)[chosen].sum())
    return {"speedup": tokens * plain / price, "tokens_per_round": tokens / rounds, "acceptance": accepted / max(drafted, 1)}


def compare(texts: Texts, cost: Sequence[float], plain: float, entries: jax.Array | None) -> dict[str, dict[str, dict[str, float]]]:
    """Plays all controllers; results by controller, then by category, all categories together first."""
    categories = np.array(texts.categories)
    groups = {report.ALL: np.ones(len(categories), bool)} | {name: categories == name for name in dict.fromkeys(texts.categories)}
    result = {}
    for name, arms in controllers(cost).items():
        played = play(arms, texts._replace(categories=()), jnp.array(cost, jnp.float32), entries)
        result[name] = {group: summary(played, texts, plain, chosen) for group, chosen in groups.items()}
    return result


def read_answers(engine: Engine, journal: Journal, batches: Sequence[benchmark.Batch]) -> list[tuple[str, list[int], list[int]]]:
    """Reads category, prompt and plain answer of every turn, as token ids."""
    runs = {(run.batch, run.turn): run for run in journal.runs() if run.controller == PLAIN}
    rows = []
    for index, batch in enumerate(batches):
        histories = {place: list(conversation.history) for place, conversation in batch.conversations.items()}
        for turn in range(batch.turns):
            prompts = benchmark.next_prompts(engine, batch, histories, turn, journal.settings["chat"], warn=lambda _: None)
            if not prompts:
                break
            if (run := runs.get((index, turn))) is None:
                raise UserError(f"--results {FLAGS.results!r} lacks answers of plain decoding; expected a finished benchmark")
            for (place, prompt), answer in zip(prompts.items(), run.answers, strict=True):
                rows.append((batch.category, prompt, answer.token_ids))
                histories[place].append({"role": "assistant", "content": answer.text})
    return rows


def find_cost(journal: Journal) -> tuple[list[float], float]:
    """Finds the costs of rounds with looked-up drafts, and of a plain step."""
    if FLAGS.cost is not None:
        try:
            cost = [float(value) for value in FLAGS.cost]
        except ValueError:
            cost = []
        if len(cost) < 2 or not all(0 < value < float("inf") for value in cost):
            raise UserError(f"--cost is {','.join(FLAGS.cost)!r}; expected at least two positive numbers, as in 1,1.1,1.3")
        return cost, cost[0]
    if journal.costs is None or not journal.costs.look_up:
        raise UserError(
            f"--results {FLAGS.results!r} does not know the price of looked-up drafts; expected --cost, or a benchmark with lookup"
        )
    return list(journal.costs.look_up), journal.costs.plain


def main(argv: Sequence[str]) -> None:
    del argv
    for flag in ("prompts", "results"):
        if not FLAGS[flag].value:
            raise UserError(f"--{flag} is missing; expected a {'file of prompts' if flag == 'prompts' else 'folder'}")
    journal = Journal.read(pathlib.Path(FLAGS.results).expanduser() / "runs.jsonl")
    conversations = read_prompts(FLAGS.prompts)[: journal.settings["conversations"]]
    if prompts_sha256(conversations) != journal.settings["prompts_sha256"]:
        raise UserError(f"--prompts {FLAGS.prompts!r} is not what {FLAGS.results!r} was made with; expected the same file")
    cost, plain = find_cost(journal)
    engine = eesd_jax.load(FLAGS.model, exit_branch="none", ngrams=FLAGS.ngrams)
    rows = read_answers(engine, journal, benchmark.make_batches(conversations, journal.settings["batch_size"]))
    texts = texts_of(rows, journal.settings["max_new_tokens"], len(cost) - 1)
    entries = engine.drafter.ngrams if engine.drafter else None
    result = compare(texts, cost, plain, None if entries is None else jnp.asarray(entries))

    best = max(result[name][report.ALL]["speedup"] for name in result if name.startswith("fixed:"))
    lines = []
    for name, groups in result.items():
        found = groups[report.ALL]
        worst = min((group for group in groups if group != report.ALL), key=lambda group: groups[group]["speedup"])
        columns = (found["speedup"], found["speedup"] / best, found["speedup"] / result[CLAIRVOYANT][report.ALL]["speedup"])
        columns += (found["tokens_per_round"], found["acceptance"], groups[worst]["speedup"])
        lines.append((name, *(f"{value:.3f}" for value in columns), worst))
    header = ("controller", "speed-up", "of best fixed", "of clairvoyant", "tokens a round", "acceptance", "slowest category", "")
    print(report.table(header, lines))
    print("by category, of the best fixed length there:", end=" ")
    for group in list(result["cost_aware"])[1:]:
        of_group = max(result[name][group]["speedup"] for name in result if name.startswith("fixed:"))
        print(f"{group} {result['cost_aware'][group]['speedup'] / of_group:.3f}", end="  ")
    print()
    if FLAGS.json:
        with files.whole_file(FLAGS.json) as file:
            json.dump({"cost": cost, "plain": plain, "temperature": journal.settings["temperature"], "controllers": result}, file, indent=2)


if __name__ == "__main__":
    cli.run(main)
