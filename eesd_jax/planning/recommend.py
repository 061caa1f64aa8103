"""Recommends a slice: tries the standard ones, smallest first, until one fits.

Slices that cannot even hold the arrays are not compiled for. A training step is tried on the mesh that arithmetic (`estimates.py`) finds
fastest among those that fit; if the compiler disagrees, on the one that needs least memory.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import NamedTuple

from eesd_jax.config import ExperimentConfig, MeshConfig
from eesd_jax.errors import UserError
from eesd_jax.model.config import ModelConfig
from eesd_jax.planning import estimates, needs, programs, slices
from eesd_jax.planning.needs import Need
from eesd_jax.planning.programs import DISTILL, DecodeShape, DoesNotFit
from eesd_jax.planning.slices import Slice

# Plans what is asked for of a config on a slice, program by program: compiled, or by arithmetic.
Planner = Callable[[ExperimentConfig, ModelConfig, Slice, DecodeShape, str], Iterator[Need]]


class Split(NamedTuple):
    """A mesh, and the estimate of the training step on it."""

    mesh: MeshConfig
    need: Need


class Tried(NamedTuple):
    """A slice that was tried. mesh: of training. problem: why it does not fit, else None. needs: of its programs; may be incomplete."""

    where: Slice
    mesh: MeshConfig | None
    problem: str | None
    needs: tuple[Need, ...] = ()


def plan_for(config: ExperimentConfig, model: ModelConfig, where: Slice, shape: DecodeShape, what: str) -> Iterator[Need]:
    """Plans what is asked for: compiles where there is a compiler, else estimates.

    Raises:
      UserError: a mesh or a batch that does not fit the slice.
      DoesNotFit: the compiler says that it needs more memory than there is.
    """
    if where.is_tpu:
        yield from map(needs.need, programs.compile_programs(config, model, slices.find_devices(where), shape, what))
    else:
        yield from estimates.estimate(config, model, where, shape, what)


def splits(config: ExperimentConfig, model: ModelConfig, where: Slice) -> list[Split]:
    """Lists the ways to lay chips out along `data` and `fsdp` that the batch and the number of slices allow; `tensor` is the config's."""
    found = []
    chips = where.chips // config.mesh.tensor
    for fsdp in (size for size in range(1, chips + 1) if chips % size == 0):
        mesh = MeshConfig(chips // fsdp, fsdp, config.mesh.tensor)
        try:
            found.append(Split(mesh, estimates.estimate_distill(dataclasses.replace(config, mesh=mesh), model, where)))
        except UserError:  # rows, or slices, that it does not divide
            continue
    return found


def least_seconds(need: Need, where: Slice) -> float:
    """Returns the least time of the program's first way to run."""
    return needs.times(need.runs[0].cost, where).step


def try_slices(
    config: ExperimentConfig,
    model: ModelConfig,
    families: tuple[str, ...],
    shape: DecodeShape,
    what: str,
    *,
    count: int = 1,
    planner: Planner = plan_for,
) -> Iterator[Tried]:
    """Tries the slices of those families, smallest first, until one of each family fits.

    Args:
      count: how many of each, joined by a network.
      planner: see `plan_for`.
    """
    names = [(family, name) for family in families for name in slices.offered(family)]
    fitting: set[str] = set()
    for family, where in sorted(((family, slices.find_slice(name, count)) for family, name in names), key=_size):
        if family not in fitting:
            result = _try(config, model, where, shape, what, planner)
            fitting |= set() if result.problem else {family}
            yield result


def _size(named: tuple[str, Slice]) -> int:
    return named[1].chips


def _try(config: ExperimentConfig, model: ModelConfig, where: Slice, shape: DecodeShape, what: str, planner: Planner) -> Tried:
    meshes: list[MeshConfig | None] = [None]
    if what in ("distill", "all"):
        found = splits(config, model, where)
        if not found:
            return Tried(where, None, f"no mesh of {where.chips} chips divides a batch of {config.batch_size} rows")
        least = min(found, key=_total)
        if problem := _hopeless(least.need, where):
            return Tried(where, least.mesh, problem)
        fitting = [split for split in found if needs.find_problem(split.need, where) is None]
        fastest = min(fitting, key=lambda split: (least_seconds(split.need, where), _total(split)), default=least)
        meshes = list(dict.fromkeys((fastest.mesh, least.mesh)))
    if what in ("decode", "all"):
        for need in estimates.estimate_decode(config, model, where, shape):
            if problem := _hopeless(need, where):
                return Tried(where, meshes[0], problem)
    for mesh in meshes:
        changed = config if mesh is None else dataclasses.replace(config, mesh=mesh)
        got, problems = [], []
        try:
            for need in planner(changed, model, where, shape, what):
                got.append(need)
                problems += filter(None, [needs.find_problem(need, where)])
        except DoesNotFit as error:
            problems.append(str(error))
        result = Tried(where, mesh, "; ".join(problems) or None, tuple(got))
        if not problems:
            break
    return result


def _total(split: Split) -> int:
    return split.need.memory.total


def _hopeless(need: Need, where: Slice) -> str | None:
    held, there = sum(need.memory.held.values()), where.chip.memory
    if held <= there:
        return None
    return f"{need.name} holds {needs.gib(held)} GiB a chip without temporaries, of {needs.gib(there)} (not compiled)"


def tried(split: Split, where: Slice) -> Tried:
    """Turns a mesh into a try by arithmetic alone."""
    return Tried(where, split.mesh, needs.find_problem(split.need, where), (split.need,))


def mesh_flags(tried: Tried) -> str:
    """Writes the flags that give the commands the mesh of that try."""
    mesh = tried.mesh
    return "" if mesh is None else f", with --config.mesh.data={mesh.data} --config.mesh.fsdp={mesh.fsdp}"


def row(tried: Tried, tokens: float) -> tuple[str, ...]:
    """Makes a row of the table: slice, chips, mesh, memory, least time of a step, chip-hours for the tokens, verdict."""
    where, mesh = tried.where, tried.mesh
    laid_out = "" if mesh is None else f"{mesh.data} x {mesh.fsdp} x {mesh.tensor}"
    most = max((need.memory.total for need in tried.needs), default=0)
    memory = f"{needs.gib(most)} of {needs.gib(where.chip.memory)}" if most else f"of {needs.gib(where.chip.memory)}"
    steps = [f"{1e3 * least_seconds(need, where):.4g}" for need in tried.needs if need.name in (DISTILL, programs.PLAIN)]
    hours = [
        f"{tokens / need.runs[0].tokens * least_seconds(need, where) / 3600 * where.chips:.4g}"
        for need in tried.needs
        if need.name == DISTILL
    ]
    return where.title, str(where.chips), laid_out, memory, " / ".join(steps), "".join(hours), tried.problem or "fits"


HEADER = ("slice", "chips", "data x fsdp x tensor", "GiB a chip", "ms at least: step / plain step", "chip-hours", "verdict")
