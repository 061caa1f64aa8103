"""Says what training and decoding would need on a TPU slice, without one: compiles the real programs for it and reads what came out.

python train/plan.py --config=configs/llama13b.py --topology=v5p:2x2x1
python train/plan.py --config=configs/llama8b.py --topology=v6e:1x1 --what=decode --batch_size=8 --max_new_tokens=1024

Needs the libtpu wheel (pip install libtpu), and neither weights nor a network for the models in configs/. Times are a bound: nothing on a
chip waits for anything else. Exit code 1 if a program needs more memory than a chip has.
"""

import os
import sys
from collections.abc import Sequence

from absl import flags

from eesd_jax import cli, control, experiment
from eesd_jax.config import DecodeConfig, DraftConfig
from eesd_jax.errors import UserError

WHAT = ("distill", "decode", "all")
experiment.define_config_flag()
flags.DEFINE_string("topology", None, "The slice: v4:AxBxC, v5e:AxB, v5p:AxBxC or v6e:AxB, with the chips along each dimension.")
flags.DEFINE_integer("slices", 1, "How many such slices, joined by a network; mesh.data lies across them.")
flags.DEFINE_string("what", "distill", f"What to plan for: {', '.join(WHAT)}.")
flags.DEFINE_float("tokens", None, "Tokens to train on; default: those of the config's steps.")
flags.DEFINE_integer("batch_size", DecodeConfig.batch_size, "Rows decoded at once.")
flags.DEFINE_integer("prompt_tokens", 512, "Tokens of the prompts that are decoded.")
flags.DEFINE_integer("max_new_tokens", DecodeConfig.max_new_tokens, "Tokens decoded, at most.")
flags.DEFINE_integer("max_draft", DraftConfig.max_draft, "The most tokens to draft in a round.")
flags.DEFINE_string("controller", "beta", "How many tokens to draft: fixed:K, threshold:t, beta, beta:plain or calibrated.")
FLAGS = flags.FLAGS
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
    if FLAGS.topology is None:
        raise UserError("--topology is missing; expected a slice such as v5p:2x2x1")
    spec = control.parse_controller(FLAGS.controller, FLAGS.max_draft)
    if spec.kind in (control.PLAIN, "cost_aware"):
        raise UserError(f"--controller is {FLAGS.controller!r}; expected one that drafts, and not by times measured on the machine")
    os.environ.update(ENVIRONMENT)

    from eesd_jax import plan, slices
    from eesd_jax.report import table
    from eesd_jax.weights.known import find_config

    where, model = slices.find_slice(FLAGS.topology, FLAGS.slices), find_config(config.model)
    shape = plan.DecodeShape(FLAGS.batch_size, FLAGS.prompt_tokens, FLAGS.max_new_tokens, FLAGS.max_draft, spec)
    tokens = FLAGS.tokens or float(config.steps * config.batch_size * config.data.sequence_length)
    target = FLAGS.topology if FLAGS.slices == 1 else f"{FLAGS.slices} x {FLAGS.topology}"
    columns, problems = {}, []
    try:
        with cli.notice(f"compiling for {target} ..."):
            for program in plan.compile_programs(config, model, where, shape, FLAGS.what):
                columns[program.name] = plan.describe(program, where, tokens)
                if problem := plan.find_problem(program, where):
                    problems.append(problem)
    except plan.DoesNotFit as error:
        problems.append(str(error))
    if columns:
        rows = dict.fromkeys(row for column in columns.values() for row in column)
        title = f"{config.model} on {target}, {len(where.devices)} chips"
        print(table((title, *columns), [(row, *(column.get(row, "") for column in columns.values())) for row in rows]))
    if problems:
        print(f"{target} is too small: {'; '.join(problems)}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main)
