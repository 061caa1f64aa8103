"""The target writes its own training text: responses to prompts, as a tfds dataset with masks and provenance, in OUTPUT_DIR/dataset.

python train/self_generate.py --config=configs/X.py
python train/self_generate.py --config=configs/X.py --config.self_generate.prompts=questions.jsonl --config.output_dir=runs/mine
python train/self_generate.py --config=configs/X.py --config.self_generate.prompts=self --config.self_generate.num_responses=1000

Prompts: a JSONL file, tfds:NAME, or self: the model writes the user's turn, too. Started again after a kill, it goes on where it stopped.
On several hosts start it on each of them, with an output_dir that all of them see: TPU pods and SLURM are recognised, elsewhere
--coordinator_address, --num_processes and --process_id say who is who.
"""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from eesd_jax import cli
from eesd_jax.distill import experiment

if TYPE_CHECKING:
    from eesd_jax.distill import self_generate

experiment.define_config_flag()
cli.define_distributed_flags()


def main(argv: Sequence[str]) -> None:
    del argv
    config = experiment.config_from_flags()
    cli.start_distributed(experiment.to_dict(config))

    from eesd_jax.cluster import platforms
    from eesd_jax.distill import self_generate

    platforms.start()
    with progress_bar() as watch:
        summary = self_generate.self_generate(config, watch=watch)
    print(summary.line)


@contextmanager
def progress_bar() -> "Iterator[Callable[[self_generate.Progress], None] | None]":
    """On a terminal a bar with response tokens a second and the time left; nothing elsewhere."""
    if not sys.stderr.isatty():
        yield None
        return
    columns = (
        "generating",
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("generating", total=None, rate="loading the model ...")
        first: float | None = None

        def watch(progress: "self_generate.Progress") -> None:
            nonlocal first
            now = time.perf_counter()
            first = now if first is None else first
            rate = f"{progress.tokens / (now - first):.0f} tokens/s" if progress.tokens else "compiling ..."
            bar.update(task, completed=progress.done, total=progress.total, rate=rate)

        yield watch


if __name__ == "__main__":
    cli.run(main)
