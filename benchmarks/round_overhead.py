"""Times rounds of every length on the built-in model, and compares them with the sum of their parts.

    python benchmarks/round_overhead.py
    python benchmarks/round_overhead.py --batch_size=8 --controllers=forced,beta --output=overhead.json

The parts run each in a jitted loop of its own, with its caches in place: blocks 1..N on one token (k + 1 times in a round of k drafts); the
exit block, its head and the draw of a draft (k times); at the compiled width that holds k + 1 tokens, blocks N+1..L, the head, acceptance;
and what the controller computes. A part by itself finds its weights in the processor's caches, from which the other parts of a round have
driven them. So there is also a bare round: the same parts one after the other, and nothing else.

Rounds are those of the real program, with the number of drafts forced whatever the controller says; what it says is computed nevertheless.
Each round is timed side by side with its parts, and medians of ratios count, so that whatever else the machine does meets both alike.

A second table compares each part with memory: the time to read its weights and the valid part of its caches once, at the rate at which a
matrix of 1 GiB is read in the same run.
"""

import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import flags
from rates import read_bandwidth
from stand_in import untrained_drafter
from work import Work, work_of_parts

import eesd_jax
from eesd_jax import cli, files
from eesd_jax.bench import report
from eesd_jax.config import DecodeConfig, DraftConfig, SamplingConfig
from eesd_jax.decode import accept
from eesd_jax.decode.controllers import Calibration, Controller, Fixed, Offer, Outcome, Posterior, Setup, build_controller, parse_controller
from eesd_jax.decode.costs import RoundCosts
from eesd_jax.decode.draft import split_keys
from eesd_jax.decode.sampling import Sampling, sample
from eesd_jax.decode.state import DecodeState
from eesd_jax.engine import timing
from eesd_jax.engine.engine import Engine
from eesd_jax.model import cache as kv
from eesd_jax.model import exit_branch, llama

FLAGS = flags.FLAGS
flags.DEFINE_list("controllers", ["forced", "beta", "cost_aware"], "Controllers whose rounds are timed; `forced` computes nothing.")
flags.DEFINE_integer("batch_size", 1, "Rows that are decoded together.")
flags.DEFINE_integer("max_draft", 8, "The most tokens that a round may draft.")
flags.DEFINE_integer("steps", 8, "Rounds, or repetitions of a part, that are timed together.")
flags.DEFINE_integer("repeats", 9, "Times that each is timed; the median counts.")
flags.DEFINE_string("output", None, "File to write the result to (JSON).")


@dataclasses.dataclass(frozen=True)
class Leading(Controller):
    """Drafts `length` tokens always, and still computes all that another controller does."""

    inner: Controller
    length: int

    def init(self, batch: int) -> Any:
        return self.inner.init(batch)

    def propose(self, keys_B: jax.Array, state: Any, offer: Offer) -> Any:
        return self.inner.propose(keys_B, state, offer)

    def keep_drafting(self, keys_B: jax.Array, plan: Any, k: jax.Array, confidence_B: jax.Array) -> tuple[jax.Array, Any]:
        wanted, plan = self.inner.keep_drafting(keys_B, plan, k, confidence_B)
        # A confidence is never negative, but XLA does not know, and computes `wanted`.
        return jnp.where(confidence_B < 0, wanted, k < self.length), plan

    def update(self, state: Any, plan: Any, outcome: Outcome) -> Any:
        return self.inner.update(state, plan, outcome)

    def posterior(self, state: Any) -> Posterior | None:
        return self.inner.posterior(state)


def greedy(batch: int) -> Sampling:
    """Makes greedy settings for every row, without filters."""
    zeros = jnp.zeros(batch)
    return Sampling(temperature=zeros, top_k=jnp.zeros(batch, jnp.int32), top_p=zeros + 1, min_p=zeros)


def wait_for(value_B: jax.Array, result: jax.Array) -> jax.Array:
    """Returns the same value, made to depend on a result: so that each turn of a loop needs the one before."""
    return value_B + jnp.isnan(result.ravel()[0]).astype(value_B.dtype)


class Parts:
    """Loops over the parts of a round; each takes the state and how often, and returns the state.

    They do what `decode/round.py` does, without the code that joins them.
    """

    def __init__(self, engine: Engine, sampling: Sampling):
        self.config, self.draft = engine.model.config, engine.drafter.draft
        self.params, self.branch, self.sampling = engine.params, engine.branch, sampling

    def loops(self) -> dict[Any, Callable[[DecodeState, int], DecodeState]]:
        """Makes the loops by name: "early", "exit", ("verify", width), and ("bare", drafts)."""
        steps = {"early": self.early, "exit": self.exit}
        steps |= {("verify", width): functools.partial(self.verify, width) for width in self.draft.widths}
        steps |= {("bare", drafts): functools.partial(self.bare, drafts) for drafts in range(self.draft.max_draft + 1)}

        def loop(step: Callable, params: llama.Params, branch: exit_branch.ExitBranch, state: DecodeState, times: jax.Array) -> DecodeState:
            return jax.lax.fori_loop(0, times, lambda _, state: step(params, branch, state), state)

        return {
            name: functools.partial(jax.jit(functools.partial(loop, step), donate_argnums=2), self.params, self.branch)
            for name, step in steps.items()
        }

    def early(self, params: llama.Params, branch: exit_branch.ExitBranch, state: DecodeState) -> DecodeState:
        """Runs blocks 1..N on one token."""
        depth, cache = self.draft.exit_layer, state.cache
        token_B, start_B = jnp.take_along_axis(state.tokens, state.length[:, None] - 1, axis=1)[:, 0], state.length - 1
        caches = kv.KVCache(cache.k[:depth], cache.v[:depth])
        x, new = llama.forward_blocks(self.config, params["blocks"], llama.embed(params, token_B[:, None]), start_B, caches, range(depth))
        caches = kv.write(caches, new, start_B, after=x)
        cache = kv.KVCache(caches.k + cache.k[depth:], caches.v + cache.v[depth:])
        return state._replace(length=wait_for(state.length, x), cache=cache)

    def exit(self, params: llama.Params, branch: exit_branch.ExitBranch, state: DecodeState) -> DecodeState:
        """Runs the exit block on one hidden state, its head, and the draw."""
        start_B = state.length - 1
        h = llama.embed(params, state.tokens[:, :1])
        x, new = exit_branch.run_exit_block(self.config, branch, h, start_B, state.draft.exit_cache)
        exit_cache = kv.write(state.draft.exit_cache, new, start_B, after=x)
        logits_BxQ = exit_branch.draft_logits(branch, exit_branch.draft_output(self.config, branch, x))[:, 0]
        draw = sample(state.row_keys, logits_BxQ, self.sampling)
        chosen_logit = jnp.take_along_axis(logits_BxQ, draw.token[:, None], axis=1)[:, 0]
        confidence_B = jnp.exp(chosen_logit - jax.nn.logsumexp(logits_BxQ, axis=1))
        length = wait_for(wait_for(state.length, confidence_B), draw.probs)
        return state._replace(length=length, draft=state.draft._replace(exit_cache=exit_cache))

    def verify(self, width: int, params: llama.Params, branch: exit_branch.ExitBranch, state: DecodeState) -> DecodeState:
        """Runs blocks N+1..L on `width` hidden states, the head, acceptance, and the exit block's keys and values."""
        depth, cache, start_B = self.draft.exit_layer, state.cache, state.length - 1
        batch = start_B.size
        h = llama.embed(params, state.tokens[:, :width])
        x, new = llama.forward_blocks(self.config, params["blocks"], h, start_B, cache, range(depth, self.config.num_layers))
        _, new_exit = exit_branch.run_exit_block(self.config, branch, h, start_B, None)
        none = jnp.zeros((batch, width - 1), jnp.int32)
        probs = jnp.zeros((batch, width - 1, branch.draft_ids.size), jnp.float32)
        others = accept.empty_others(batch, width - 1, 0, branch.draft_ids.size)
        drafts = accept.Drafts(none, jnp.full(batch, width - 1), none, probs, jnp.zeros(batch, bool), others)
        keys = split_keys(state, width - 1).verify
        verdict = accept.accept(keys, drafts, branch.draft_ids, llama.logits(self.config, params, x), self.sampling)
        late = kv.write(kv.KVCache(cache.k[depth:], cache.v[depth:]), new, start_B, after=x)
        exit_cache = kv.write(state.draft.exit_cache, new_exit, start_B, after=x)
        length = wait_for(state.length, verdict.token.astype(jnp.float32))
        cache = kv.KVCache(cache.k[:depth] + late.k, cache.v[:depth] + late.v)
        return state._replace(length=length, cache=cache, draft=state.draft._replace(exit_cache=exit_cache))

    def bare(self, drafts: int, params: llama.Params, branch: exit_branch.ExitBranch, state: DecodeState) -> DecodeState:
        """Runs the parts of a round of so many drafts, one after the other."""

        def one_draft(_: jax.Array, state: DecodeState) -> DecodeState:
            return self.early(params, branch, self.exit(params, branch, state))

        state = jax.lax.fori_loop(0, drafts, one_draft, self.early(params, branch, state))
        return self.verify(self.draft.width_of(drafts), params, branch, state)


def controller_loop(controller: Controller, drafts: int, batch: int, times: jax.Array) -> Any:
    """Loops over what a controller computes in rounds of so many drafts."""
    keys_B = jax.vmap(jax.random.key)(jnp.arange(batch))

    def one_round(i: jax.Array, state: Any) -> Any:
        round_keys = jax.vmap(jax.random.fold_in, (0, None))(keys_B, i)
        plan = controller.propose(round_keys, state, Offer(running=jnp.ones(batch, bool)))

        def ask(k: jax.Array, carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
            count, plan = carry
            keep, plan = controller.keep_drafting(jax.vmap(jax.random.fold_in, (0, None))(round_keys, k), plan, k, jnp.full(batch, 0.5))
            return count + keep, plan

        count, plan = jax.lax.fori_loop(0, drafts + 1, ask, (jnp.zeros(batch, jnp.int32), plan))
        outcome = Outcome(drafted=jnp.full(batch, drafts), accepted=jnp.minimum(count, drafts), replaced=jnp.zeros(batch, bool))
        return controller.update(state, plan, outcome)

    return jax.lax.fori_loop(0, times, one_round, controller.init(batch))


def seconds_of(work: Callable[[], Any]) -> float:
    """Measures the wall time of one call."""
    start = time.perf_counter()
    jax.block_until_ready(work())
    return time.perf_counter() - start


class Sample(NamedTuple):
    """Seconds of one round, of a bare one, and of the parts: early, exit and verify once each, decisions of the whole round."""

    round: float
    bare: float
    early: float
    exit: float
    verify: float
    decisions: float

    def parts(self, drafts: int) -> float:
        """Sums the seconds of all parts of a round of so many drafts."""
        return (drafts + 1) * self.early + drafts * self.exit + self.verify + self.decisions


def made_up_controller(name: str, max_draft: int) -> Controller:
    """Makes the controller of that name; `forced` computes nothing."""
    if name == "forced":
        return Fixed(0)
    costs = RoundCosts(exit=tuple(1 + 0.02 * drafts for drafts in range(max_draft + 1)), look_up=())
    spec = parse_controller(name, max_draft)
    return build_controller(spec, Setup(calibration=Calibration(), costs=costs))


def measure(engine: Engine, names: Sequence[str], batch: int, steps: int, repeats: int) -> dict[tuple[str, int], list[Sample]]:
    """Samples rounds under each controller with each number of drafts, one a repeat."""
    draft, parts = engine.drafter.draft, Parts(engine, greedy(batch)).loops()
    prompts = [list(range(1, timing.PROMPT_TOKENS + 1))] * batch
    budget = max(engine.decode_config.max_new_tokens, steps * (draft.max_draft + 1) + 1)
    controllers = {name: made_up_controller(name, draft.max_draft) for name in names}
    ask = jax.jit(controller_loop, static_argnums=(0, 2))
    start_state = functools.partial(engine.prefill, prompts, [0] * batch, batch, budget)

    def time_part(name: Any) -> float:
        state = jax.block_until_ready(start_state(Fixed(0)))
        # A short part is repeated more often, so that starting the program counts for as little as in a loop of rounds.
        often = steps * (8 if name in ("early", "exit") else 1)
        return seconds_of(lambda: parts[name](state, jnp.int32(often))) / often

    def time_round(controller: Leading) -> float:
        state = jax.block_until_ready(start_state(controller))
        return seconds_of(lambda: engine.decode(state, SamplingConfig(), controller, steps)) / steps

    samples: dict[tuple[str, int], list[Sample]] = {}
    for repeat in range(repeats + 1):
        for drafts in range(draft.max_draft + 1):
            others = ("early", "exit", ("verify", draft.width_of(drafts)))
            for name, controller in controllers.items():
                asked = seconds_of(lambda c=controller, k=drafts: ask(c, k, batch, jnp.int32(steps))) / steps
                sample = Sample(time_round(Leading(controller, drafts)), time_part(("bare", drafts)), *map(time_part, others), asked)
                if repeat > 0:  # the first time compiles
                    samples.setdefault((name, drafts), []).append(sample)
    return samples


def result_rows(samples: dict[tuple[str, int], list[Sample]]) -> list[dict[str, Any]]:
    """Makes a row for each controller and number of drafts: medians in milliseconds, and of a round's ratios to the others."""
    rows = []
    for (name, drafts), found in samples.items():
        medians = Sample(*(1e3 * statistics.median(values) for values in zip(*found, strict=True)))
        to_bare = statistics.median(sample.round / (sample.bare + sample.decisions) for sample in found)
        to_parts = statistics.median(sample.round / sample.parts(drafts) for sample in found)
        row = {"controller": name, "drafts": drafts} | medians._asdict() | {"parts": medians.parts(drafts)}
        rows.append(row | {"ratio_to_bare": to_bare, "ratio_to_parts": to_parts})
    return sorted(rows, key=lambda row: row["controller"])


def part_rows(
    samples: dict[tuple[str, int], list[Sample]], works: dict[Any, Work], draft: DraftConfig, bandwidth: float
) -> list[dict[str, Any]]:
    """Makes a row for each part: its work, and milliseconds at least and as measured (median)."""
    seconds: dict[Any, list[float]] = {name: [] for name in works}
    for (_, drafts), found in samples.items():
        seconds["early"] += [sample.early for sample in found]
        seconds["exit"] += [sample.exit for sample in found]
        seconds["verify", draft.width_of(drafts)] += [sample.verify for sample in found]
    rows = []
    for name, work in works.items():
        bound, taken = work.least_seconds(bandwidth), statistics.median(seconds[name])
        row = {"part": name if isinstance(name, str) else f"verify {name[1]}"} | work._asdict()
        rows.append(
            row | {"memory_bound": 1e3 * bound, "taken": 1e3 * taken, "ratio": taken / bound, "gflop_per_second": work.flops / taken / 1e9}
        )
    return rows


def main(argv: Sequence[str]) -> None:
    del argv
    model = eesd_jax.load("demo", dtype="float32", exit_branch="none").model._replace(eos_ids=())
    engine = Engine(model, DecodeConfig(), untrained_drafter(model, FLAGS.max_draft))
    samples = measure(engine, FLAGS.controllers, FLAGS.batch_size, FLAGS.steps, FLAGS.repeats)
    rows = result_rows(samples)
    columns = ("drafts", "early", "exit", "verify", "decisions", "parts", "bare", "round", "ratio_to_parts", "ratio_to_bare")
    lines = [(row["controller"], *(f"{row[name]:.2f}" if name != "drafts" else str(row[name]) for name in columns)) for row in rows]
    header = ("controller", "drafts", "blocks 1..N", "exit and draw", "verify", "decisions", "sum of parts", "bare round", "round")
    header += ("round / sum", "round / bare")
    print(report.table(header, lines))
    bandwidth, draft = read_bandwidth(), engine.drafter.draft
    works = work_of_parts(model.config, draft, engine.params, engine.branch, FLAGS.batch_size, timing.PROMPT_TOKENS)
    parts = part_rows(samples, works, draft, bandwidth)
    header = ("part", "MB", "MFLOP", f"ms at least, at {bandwidth / 1e9:.1f} GB/s", "ms", "of that", "GFLOP/s")
    lines = []
    for row in parts:
        work, times = (
            (f"{row[name] / 1e6:.1f}" for name in Work._fields),
            (f"{row[name]:.2f}" for name in ("memory_bound", "taken", "ratio")),
        )
        lines.append((row["part"], *work, *times, f"{row['gflop_per_second']:.0f}"))
    print(report.table(header, lines))
    if FLAGS.output:
        with files.whole_file(FLAGS.output) as file:
            result = {"batch_size": FLAGS.batch_size, "milliseconds": rows, "parts": parts, "read_bandwidth": bandwidth}
            json.dump(result, file, indent=2)


if __name__ == "__main__":
    cli.run(main)
