"""Says what a program needs of a chip: memory by kind, and the least time; of compiled programs and of estimated ones (`estimates.py`).

For training everything comes from the HLO. For decoding, arithmetic and memory traffic come from the arrays (`counts.py`), and the bytes
that chips send from the HLO.
"""

from typing import NamedTuple

import jax

from eesd_jax.planning import hlo
from eesd_jax.planning.counts import bytes_of_a_chip
from eesd_jax.planning.programs import DISTILL, PREFILL, ROUND, Program
from eesd_jax.planning.slices import Slice


class Memory(NamedTuple):
    """Bytes of one chip.

    held: by kind, see `programs.Program`. padding: of arguments, to whole tiles. output: beyond what takes an argument's place.
    """

    held: dict[str, int]
    padding: int
    temporaries: int
    output: int
    code: int

    @property
    def total(self) -> int:
        return sum(self.held.values()) + self.padding + self.temporaries + self.output + self.code


class Times(NamedTuple):
    """Seconds that one run takes a chip at least, if it were bound by arithmetic, by memory, or by links alone."""

    compute: float
    memory: float
    links: float

    @property
    def step(self) -> float:
        return max(self)

    @property
    def bound(self) -> str:
        """Names what the run waits for: the largest of the three."""
        return max(self._fields, key=lambda name: getattr(self, name))


class Run(NamedTuple):
    """One way in which a program runs. name: as of `programs.Run`. tokens: taken, or made at most. cost: of one chip."""

    name: str
    tokens: int
    cost: hlo.Cost


class Need(NamedTuple):
    """The needs of a program. runs: the ways in which it runs; only rounds have several."""

    name: str
    memory: Memory
    runs: tuple[Run, ...]


def memory(program: Program) -> Memory:
    """Sums up what a chip holds while the program runs."""
    held = {kind: bytes_of_a_chip(arrays) for kind, arrays in program.held.items()}
    stats = program.compiled.memory_analysis()
    arguments = [leaf for leaf in jax.tree.leaves(program.arguments) if isinstance(leaf, jax.ShapeDtypeStruct)]
    return Memory(
        held,
        max(0, stats.argument_size_in_bytes - bytes_of_a_chip(arguments)),  # those that are not used are held, but not counted
        stats.temp_size_in_bytes,
        stats.output_size_in_bytes - stats.alias_size_in_bytes,
        stats.generated_code_size_in_bytes,
    )


def need(program: Program) -> Need:
    """Reads from a compiled program what it needs."""
    module = hlo.Module(program.compiled.as_text())
    if program.name == DISTILL:
        runs = [Run("", program.tokens, module.run())]
    else:
        sent = [module.run(run.trips, run.chosen).collectives for run in program.runs]
        runs = [Run(run.name, run.tokens, run.work._replace(collectives=by)) for run, by in zip(program.runs, sent, strict=True)]
    return Need(program.name, memory(program), tuple(runs))


def times(cost: hlo.Cost, where: Slice) -> Times:
    """Computes the roofline (Williams et al. 2009) of a program on a chip of that slice; no rate is ever reached in full."""
    chip = where.chip
    traffic = sum(cost.collectives.values())
    return Times(cost.flops / chip.flops, cost.bytes / chip.bandwidth, traffic / (where.links * chip.link) if traffic else 0.0)


def find_problem(of: Need, where: Slice) -> str | None:
    """Returns one line if the program and all that the process holds do not fit into a chip's memory, else None."""
    needed, there = of.memory.total, where.chip.memory
    return f"{of.name} needs {gib(needed)} GiB of a chip's memory, which is {gib(there)} GiB" if needed > there else None


def describe(of: Need, where: Slice, tokens: float, plain: float | None = None) -> dict[str, str]:
    """Makes the table of a program: its values as text, by the name of the row.

    Args:
      tokens: to train on.
      plain: seconds of a plain step, which rounds are compared with.
    """
    held = of.memory
    rows = {f"{kind}, GiB a chip": gib(size) for kind, size in held.held.items()}
    rows |= {
        "temporaries, GiB a chip": gib(held.temporaries),
        "output, padding and code, GiB a chip": gib(held.output + held.padding + held.code),
        "**total, GiB a chip**": f"**{gib(held.total)}** of {gib(where.chip.memory)}",
    }
    if of.name == ROUND:
        return rows | _describe_rounds(of, where, plain)
    (run,) = of.runs
    least = times(run.cost, where)
    rows |= {
        "matrix products, TFLOP a chip": f"{run.cost.flops / 1e12:.4g}",
        "memory traffic, GB a chip": f"{run.cost.bytes / 1e9:.4g}",
    }
    rows |= {f"{kind}, GB a chip": f"{sent / 1e9:.4g}" for kind, sent in sorted(run.cost.collectives.items())}
    rows |= {f"{name}, ms at least": _ms(seconds) for name, seconds in least._asdict().items()}
    rows["**one run, ms at least**"] = f"**{_ms(least.step)}** ({least.bound})"
    rows["prompt tokens a second, at most" if of.name == PREFILL else "tokens a second, at most"] = f"{run.tokens / least.step:,.0f}"
    if of.name == DISTILL:
        hours = tokens / run.tokens * least.step / 3600
        rows[f"hours for {tokens / 1e6:,.0f} M tokens, at least"] = f"{hours:.4g}"
        rows["chip-hours, at least"] = f"{hours * where.chips:.4g}"
    return rows


def _describe_rounds(of: Need, where: Slice, plain: float | None) -> dict[str, str]:
    rows, best = {}, 0.0
    for run in of.runs:
        least = times(run.cost, where)
        best = max(best, run.tokens / least.step)
        equal = f", as {least.step / plain:.2f} plain steps" if plain else ""
        rows[f"**one run, ms at least**, with {run.name}"] = f"{_ms(least.step)} ({least.bound}{equal})"
    return rows | {"tokens a second, at most": f"{best:,.0f} if all drafts are accepted"}


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.4g}"


def gib(size: float) -> str:
    return f"{size / 2**30:.2f}"
