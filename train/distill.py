"""Trains an exit branch for a model, from the model's own text: OUTPUT_DIR/exit_branch is what --exit_branch takes.

python train/self_generate.py --config=configs/smollm135m.py     # the text, once
python train/distill.py --config=configs/smollm135m.py
python train/distill.py --config=configs/smollm135m.py --show_examples=3          # what is trained on, and stops there
python train/distill.py --config=configs/smollm135m.py --config.branch.exit_layer=6 --config.output_dir=runs/six

Started again after a kill, it goes on from its last checkpoint, to the very same parameters. On several hosts start it on each of them:
TPU pods and SLURM are recognised, elsewhere --coordinator_address, --num_processes and --process_id say who is who.
"""

import itertools
import pathlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from absl import flags

from eesd_jax import cli
from eesd_jax.distill import experiment
from eesd_jax.errors import UserError

if TYPE_CHECKING:
    from eesd_jax.config import ExperimentConfig

experiment.define_config_flag()
flags.DEFINE_integer("show_examples", 0, "Print so many examples of the training text, what the target wrote in ⟦ ⟧, and train nothing.")
cli.define_distributed_flags()
FLAGS = flags.FLAGS


def main(argv: Sequence[str]) -> None:
    del argv
    config = experiment.config_from_flags()
    if FLAGS.show_examples < 0:
        raise UserError(f"--show_examples is {FLAGS.show_examples}; expected an integer >= 0")
    if FLAGS.show_examples:
        show_examples(config, FLAGS.show_examples)
        return
    cli.start_distributed(experiment.to_dict(config))

    import jax

    from eesd_jax.cluster import platforms
    from eesd_jax.distill import preemption, trainer
    from eesd_jax.engine.engine import use_compilation_cache

    platforms.start()
    use_compilation_cache()
    result = trainer.train(config)
    if result.stopped:
        print(f"stopped behind step {result.step} of {config.steps}; the same command goes on from there", file=sys.stderr)
        sys.exit(preemption.STOPPED_BY_SIGNAL)
    if jax.process_index() == 0:
        found = ", ".join(f"{name} {value:.3f}" for name, value in result.metrics.items())
        print(f"{result.step} steps done{f' ({found})' if found else ''}; the exit branch is in {config.output_dir}/exit_branch")


def show_examples(config: "ExperimentConfig", count: int) -> None:
    """Prints the first examples of the training split, and which of their tokens are learnt."""
    from eesd_jax.distill import examples
    from eesd_jax.distill.example import show_mask
    from eesd_jax.weights.load import load_text

    model = load_text(config.model)
    path = config.data.path or str(pathlib.Path(config.output_dir) / "dataset")
    source = examples.open_source(path, "train", model, config.data.validation_share)
    for example in itertools.islice(source.examples, count):
        print(f"{show_mask(example, model.tokenizer)}\n")


if __name__ == "__main__":
    cli.run(main)
