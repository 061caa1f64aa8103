"""Says what training and decoding would need on a TPU slice, without one: compiles the real programs for it and reads what came out.

python train/plan.py --config=configs/llama13b.py --topology=v5p:2x2x1
python train/plan.py --config=configs/llama8b.py --topology=v6e:1x1 --what=decode --batch_size=8 --max_new_tokens=1024
python train/plan.py --config=configs/llama13b.py --recommend=v5e,v6e
python train/plan.py --config=configs/llama70b.py --topology=h100:8 --slices=2 --config.mesh.fsdp=8

Needs libtpu (pip install "jax[tpu]"), and neither weights nor a network for the models in configs/. Times are a bound: nothing on a
chip waits for anything else. For GPUs there is no compiler at hand: what is said of them is arithmetic, and marked so. Exit code 1 if a
program needs more memory than a chip has.
"""

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from absl import flags

from eesd_jax import cli
from eesd_jax.config import DecodeConfig, DraftConfig
from eesd_jax.decode.controllers import PLAIN, parse_controller
from eesd_jax.distill import experiment
from eesd_jax.errors import UserError

if TYPE_CHECKING:
    from eesd_jax.config import ExperimentConfig
    from eesd_jax.model.config import ModelConfig
    from eesd_jax.planning.programs import DecodeShape
    from eesd_jax.planning.slices import Slice

WHAT = ("distill", "decode", "all")
experiment.define_config_flag()
flags.DEFINE_string(
    "topology",
    None,
    "The slice: v4:AxBxC, v5e:AxB, v5p:AxBxC or v6e:AxB, with the chips along each dimension; or GPUs of a node: a100:N, h100:N or h200:N.",
)
flags.DEFINE_list(
    "recommend", None, "Families, as in v5e,v6e, or all: tries their slices, smallest first, and names the smallest that fits."
)
flags.DEFINE_bool("meshes", False, "Also every data x fsdp that --topology and the batch allow, by arithmetic.")
flags.DEFINE_bool("compile", True, "Compile for TPUs; --nocompile: by arithmetic alone, as for GPUs, in seconds and without libtpu.")
flags.DEFINE_integer("slices", 1, "How many such slices or nodes, joined by a network; mesh.data lies across them.")
flags.DEFINE_string("what", "distill", f"What to plan for: {', '.join(WHAT)}.")
flags.DEFINE_float("tokens", None, "Tokens to train on; default: those of the config's steps.")
flags.DEFINE_integer("batch_size", DecodeConfig.batch_size, "Rows decoded at once.")
flags.DEFINE_integer("prompt_tokens", 512, "Tokens of the prompts that are decoded.")
flags.DEFINE_integer("max_new_tokens", DecodeConfig.max_new_tokens, "Tokens decoded, at most.")
flags.DEFINE_integer("max_draft", DraftConfig.max_draft, "The most tokens to draft in a round.")
flags.DEFINE_string("controller", "beta", "How many tokens to draft: fixed:K, threshold:t, beta, beta:plain or calibrated.")
FLAGS = flags.FLAGS
BY_ARITHMETIC = "By arithmetic, not compiled."
# Chips are only compiled for: libtpu is not to look for them, nor to say that it finds none.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
}


def main(argv: Sequence[str]) -> None:
    del argv
    config = experiment.config_from_flags()
    for name in ("slices", "batch_size", "prompt_tokens", "max_new_tokens", "max_draft"):
        if FLAGS[name].value < 1:
            raise UserError(f"--{name} is {FLAGS[name].value}; expected an integer >= 1")
    if FLAGS.tokens is not None and not 0 < FLAGS.tokens < float("inf"):
        raise UserError(f"--tokens is {FLAGS.tokens}; expected a positive number")
    if FLAGS.what not in WHAT:
        raise UserError(f"--what is {FLAGS.what!r}; expected one of {', '.join(WHAT)}")
    if (FLAGS.topology is None) == (FLAGS.recommend is None):
        if FLAGS.topology is None:
            raise UserError("--topology is missing; expected a slice such as v5p:2x2x1, or --recommend")
        raise UserError(f"--topology is {FLAGS.topology!r} beside --recommend; expected one of them")
    spec = parse_controller(FLAGS.controller, FLAGS.max_draft)
    if spec.kind == PLAIN or spec.controller.needs_costs:
        raise UserError(f"--controller is {FLAGS.controller!r}; expected one that drafts, and not by times measured on the machine")
    os.environ.update(ENVIRONMENT)

    from eesd_jax.planning import programs, slices
    from eesd_jax.weights.known import find_config

    shape = programs.DecodeShape(FLAGS.batch_size, FLAGS.prompt_tokens, FLAGS.max_new_tokens, FLAGS.max_draft, spec)
    tokens = FLAGS.tokens or float(config.steps * config.batch_size * config.data.sequence_length)
    if FLAGS.recommend is None:
        problem = show_slice(config, find_config(config.model), slices.find_slice(FLAGS.topology, FLAGS.slices), shape, tokens)
    else:
        families = slices.FAMILIES if FLAGS.recommend == ["all"] else tuple(FLAGS.recommend)
        problem = show_recommendation(config, find_config(config.model), families, shape, tokens)
    if problem:
        print(problem, file=sys.stderr)
        sys.exit(1)


def show_slice(config: "ExperimentConfig", model: "ModelConfig", where: "Slice", shape: "DecodeShape", tokens: float) -> str | None:
    """Prints what the programs need there; one line where it is too small."""
    from eesd_jax.bench.report import table
    from eesd_jax.planning import estimates, needs, recommend
    from eesd_jax.planning.programs import PLAIN, DoesNotFit

    compiles = where.is_tpu and FLAGS.compile
    planner = recommend.plan_for if compiles else estimates.estimate

    if FLAGS.meshes and FLAGS.what != "decode":
        rows = [recommend.row(recommend.tried(split, where), tokens) for split in recommend.splits(config, model, where)]
        print(table(recommend.HEADER, rows))
        print(f"{BY_ARITHMETIC}\n")
    columns, problems, plain = {}, [], None
    try:
        with cli.notice(f"{'compiling' if compiles else 'reckoning'} for {where.title} ..."):
            for need in planner(config, model, where, shape, FLAGS.what):
                columns[need.name] = needs.describe(need, where, tokens, plain)
                plain = recommend.least_seconds(need, where) if need.name == PLAIN else plain
                problems += filter(None, [needs.find_problem(need, where)])
    except DoesNotFit as error:
        problems.append(str(error))
    if columns:
        rows = dict.fromkeys(row for column in columns.values() for row in column)
        title = f"{config.model} on {where.title}, {where.chips} chips"
        print(table((title, *columns), [(row, *(column.get(row, "") for column in columns.values())) for row in rows]))
        if not compiles:
            print(BY_ARITHMETIC)
    return f"{where.title} is too small: {'; '.join(problems)}" if problems else None


def show_recommendation(
    config: "ExperimentConfig", model: "ModelConfig", families: tuple[str, ...], shape: "DecodeShape", tokens: float
) -> str | None:
    """Prints what was tried and the smallest slice that fits; one line where none does."""
    from eesd_jax.bench.report import table
    from eesd_jax.planning import estimates, recommend

    planner = recommend.plan_for if FLAGS.compile else estimates.estimate
    tries = []
    with cli.notice(f"trying slices of {', '.join(families)} ..."):
        for tried in recommend.try_slices(config, model, families, shape, FLAGS.what, count=FLAGS.slices, planner=planner):
            tries.append(tried)
    print(table(recommend.HEADER, [recommend.row(tried, tokens) for tried in tries]))
    if not FLAGS.compile:
        print(BY_ARITHMETIC)
    elif not all(tried.where.is_tpu for tried in tries):
        print(f"GPUs: {BY_ARITHMETIC}")
    fitting = [tried for tried in tries if tried.problem is None]
    if not fitting:
        return f"no slice of {', '.join(families)} is large enough; the last one: {tries[-1].problem}"
    best = min(fitting, key=lambda tried: tried.where.chips)
    print(f"Smallest that fits: {best.where.title}{recommend.mesh_flags(best)}")
    return None


if __name__ == "__main__":
    cli.run(main)
