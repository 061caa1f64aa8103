"""Trains an exit branch for a model, from the model's own text: OUTPUT_DIR/exit_branch is what --exit_branch takes.

python train/self_generate.py --config=configs/smollm135m.py     # the text, once
python train/distill.py --config=configs/smollm135m.py
python train/distill.py --config=configs/smollm135m.py --config.branch.exit_layer=6 --config.output_dir=runs/six

Started again after a kill, it goes on from its last checkpoint, to the very same parameters. On several hosts start it on each of them:
TPU pods and SLURM are recognised, elsewhere --coordinator_address, --num_processes and --process_id say who is who.
"""

import sys
import warnings
from collections.abc import Sequence

from eesd_jax import cli
from eesd_jax.distill import experiment

experiment.define_config_flag()
cli.define_distributed_flags()


def main(argv: Sequence[str]) -> None:
    del argv
    config = experiment.config_from_flags()
    cli.start_distributed(experiment.to_dict(config))

    import jax

    from eesd_jax.distill import preemption, trainer
    from eesd_jax.engine.engine import use_compilation_cache

    warnings.showwarning = show_warning
    use_compilation_cache()
    result = trainer.train(config)
    if result.stopped:
        print(f"stopped behind step {result.step} of {config.steps}; the same command goes on from there", file=sys.stderr)
        sys.exit(preemption.STOPPED_BY_SIGNAL)
    if jax.process_index() == 0:
        found = ", ".join(f"{name} {value:.3f}" for name, value in result.metrics.items())
        print(f"{result.step} steps done{f' ({found})' if found else ''}; the exit branch is in {config.output_dir}/exit_branch")


def show_warning(message: Warning | str, category: type[Warning], *details: object) -> None:
    del details
    if issubclass(category, UserWarning):
        cli.warn(str(message))


if __name__ == "__main__":
    cli.run(main)
