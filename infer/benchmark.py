"""Compares controllers on a file of prompts, plain decoding always among them; writes results.json, table.md and plots.

python infer/benchmark.py --prompts=questions.jsonl --controllers=plain,fixed:4,cost_aware --output_dir=results
python infer/benchmark.py --prompts=questions.jsonl --exit_branch=FOLDER --arms=exit --controllers=beta,calibrated --output_dir=results

Every run is kept in OUTPUT_DIR/runs.jsonl as soon as it is finished: the same command, started again, goes on where it stopped.
"""

import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags
from rich.console import Console
from rich.progress import Progress

from eesd_jax import cli, files
from eesd_jax.bench.record import Journal
from eesd_jax.config import DEFAULT_CONTROLLER, NOT_QUANTIZED
from eesd_jax.decode.controllers import PLAIN, parse_controller
from eesd_jax.engine.prompts import Conversation, prompts_sha256, read_prompts
from eesd_jax.errors import UserError

FLAGS = flags.FLAGS
flags.DEFINE_list(
    "controllers", None, "Controllers to compare, separated by commas, as for --controller; default: plain and that of --controller."
)
flags.DEFINE_integer("limit", None, "Only the first so many conversations of --prompts; default: all.")
flags.DEFINE_boolean(
    "ignore_eos",
    False,
    "Let every answer take all of --max_new_tokens. A batch takes as long as its longest answer, so sampled ones, which differ from run to "
    "run, say little otherwise.",
)
flags.DEFINE_string("output_dir", None, "Folder for results.json, table.md, plots and runs.jsonl.")
cli.define_generation_flags()
cli.define_model_flags()


def main(argv: Sequence[str]) -> None:
    del argv
    names = check_flags()
    conversations = read_prompts(FLAGS.prompts)[: FLAGS.limit]
    folder = files.expand(FLAGS.output_dir)
    engine = cli.load_from_flags()
    specs = [parse_controller(name, FLAGS.max_draft) for name in names]
    if any(spec.kind != PLAIN and spec.controller.needs_branch for spec in specs):
        engine = engine.with_branch  # for all of them, so that what is compared has the same sources

    from eesd_jax.bench import report, run
    from eesd_jax.engine import timing
    from eesd_jax.engine.conversations import check_prompts
    from eesd_jax.engine.describe import describe_drafter

    chat = engine.has_chat_template if FLAGS.chat is None else FLAGS.chat
    check_prompts(engine, conversations, chat, FLAGS.prompts)
    batches = run.make_batches(conversations, FLAGS.batch_size)
    batch_size = max(len(batch.conversations) for batch in batches)
    settings = flag_settings(names, conversations) | {"batch_size": batch_size, "chat": chat}
    settings |= describe_drafter(engine) | run.describe_machine(engine)
    if FLAGS.ignore_eos:
        engine = timing.endless(engine)
    journal = Journal(folder / "runs.jsonl", settings)
    notes = []
    if len(names) > 1 and engine.drafter.branch is not None and not engine.drafter.trained:
        notes.append(cli.UNTRAINED)
        cli.warn(notes[0])
    controllers = {name: cli.build_controller(engine, name, batch_size) for name in names}
    if len(names) > 1 and journal.costs is None:
        with cli.notice("timing rounds ..."):
            journal.append("costs", run.measure_costs(engine, batch_size)._asdict())
    options = run.Options(cli.sampling_from_flags(), batch_size, FLAGS.seed, tuple(FLAGS.stop), chat)
    with Progress(console=Console(stderr=True), redirect_stdout=False, transient=True, disable=not sys.stderr.isatty()) as progress:
        total = sum(batch.turns for batch in batches) * len(names)
        task = progress.add_task("benchmark", total=total)
        try:
            for _ in run.run_all(engine, batches, controllers, options, journal, cli.warn):
                progress.advance(task)
        except KeyboardInterrupt:
            cli.note(f"[{len(journal.entries('run'))} of {total} runs are kept in {FLAGS.output_dir!r}; the same command goes on]")
            raise
    results = {"machine": run.describe_machine(engine), "model": model_name(), "notes": notes} | report.results(journal)
    write(folder, results, journal)
    print(report.summary(results["rows"]))
    print(f"[results.json, table.md and plots are in {FLAGS.output_dir}]", file=sys.stderr)


def check_flags() -> list[str]:
    """Finds what is wrong with the flags before anything slow is started; returns the controllers, plain decoding first."""
    cli.check_generation_flags()
    for flag in ("prompts", "output_dir"):
        if not FLAGS[flag].value:
            raise UserError(f"--{flag} is missing; expected a {'file of prompts' if flag == 'prompts' else 'folder'}")
    if FLAGS.limit is not None and FLAGS.limit < 1:
        raise UserError(f"--limit is {FLAGS.limit}; expected an integer >= 1")
    folder = files.expand(FLAGS.output_dir)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output_dir is {FLAGS.output_dir!r}, which is a file; expected a folder")
    names = [name.strip() for name in FLAGS.controllers or [FLAGS.controller or DEFAULT_CONTROLLER]]
    for name in names:
        cli.check_controller(name, "--controllers" if FLAGS.controllers else "--controller")
    return list(dict.fromkeys([PLAIN, *names]))


def flag_settings(names: Sequence[str], conversations: Sequence[Conversation]) -> dict[str, Any]:
    """What the flags say that the results depend on."""
    flag_names = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "stop", "mesh", "ignore_eos")
    return {
        "model": model_name(),
        "controllers": list(names),
        "prompts": os.path.basename(FLAGS.prompts),
        "conversations": len(conversations),
        "prompts_sha256": prompts_sha256(conversations),
        **{name: FLAGS[name].value for name in flag_names},
    }


def model_name() -> str:
    """The model's name, without the folders of this machine, and how it is quantised."""
    path = os.path.expanduser(FLAGS.model)
    name = os.path.basename(os.path.abspath(path)) if os.path.exists(path) else FLAGS.model
    return name if FLAGS.quantize == NOT_QUANTIZED else f"{name} ({FLAGS.quantize})"


def write(folder: pathlib.Path, results: dict[str, Any], journal: Journal) -> None:
    """Writes every file of the output folder, each under its name only when it is complete."""
    from eesd_jax.bench import plots, report

    for name, png in plots.draw_all(results["rows"], journal.runs()).items():
        with files.whole_file(folder / name) as file:
            file.buffer.write(png)
    for name, text in (("table.md", report.to_markdown(results)), ("results.json", report.to_text(results))):
        with files.whole_file(folder / name) as file:
            file.write(text)


if __name__ == "__main__":
    cli.run(main)
