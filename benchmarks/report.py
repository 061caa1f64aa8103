"""Writes the report: `infer/benchmark.py` over temperatures, batch sizes and sources of drafts, and the results of training runs.

    make report PROMPTS=questions.jsonl,functions.jsonl
    python benchmarks/report.py --prompts=questions.jsonl --output_dir=runs/report --report=docs/report.md
    python benchmarks/report.py --prompts=questions.jsonl --training="N = 2=runs/n2,N = 4=runs/n4" --norun

It takes hours on a CPU. Each benchmark is kept in a folder of OUTPUT_DIR, and goes on where it stopped when the same command is started
again; --norun reports on what there is. The report is Markdown with plots (SVG) in a folder beside it that has its name.
"""

import itertools
import json
import pathlib
import subprocess
import sys
import urllib.parse
from collections.abc import Sequence
from typing import Any, NamedTuple

from absl import flags

from eesd_jax import cli, files
from eesd_jax.bench import plots
from eesd_jax.bench.report import ALL, figure, model_and_machine, table
from eesd_jax.config import ARMS, DEFAULT_CONTROLLER, DraftConfig
from eesd_jax.decode.controllers import PLAIN, parse_controller
from eesd_jax.errors import UserError

FLAGS = flags.FLAGS
flags.DEFINE_list("prompts", None, "Files of prompts, each with a part of its own in the report.")
flags.DEFINE_string("output_dir", "runs/report", "Folder for the benchmarks.")
flags.DEFINE_string("report", "docs/report.md", "The document.")
flags.DEFINE_string("model", "demo", "As for infer/benchmark.py.")
flags.DEFINE_string("exit_branch", "auto", "As for infer/benchmark.py; none: lookup alone drafts.")
flags.DEFINE_string("ngrams", "auto", "As for infer/benchmark.py.")
flags.DEFINE_list("temperatures", ["0", "0.7", "1"], "Each is run with every batch size.")
flags.DEFINE_list("batch_sizes", ["1", "4", "16"], "Each is run with every temperature.")
flags.DEFINE_list("controllers", ["threshold:0.5", "beta", "beta:plain", "calibrated", DEFAULT_CONTROLLER], "Beside the fixed lengths.")
flags.DEFINE_list("fixed", None, "Fixed lengths to compare with; by default all, 1 to max_draft.")
flags.DEFINE_integer("max_draft", DraftConfig.max_draft, "The most tokens that a round may draft.")
flags.DEFINE_integer("max_new_tokens", 128, "Tokens of each answer.")
flags.DEFINE_integer("limit", None, "Only the first so many conversations of each file.")
flags.DEFINE_list("training", [], "Training runs for the last part, LABEL=FOLDER each, whose branches then draft alone.")
flags.DEFINE_string("training_prompts", None, "Prompts that they draft for; by default the first file of --prompts.")
flags.DEFINE_boolean("run", True, "Do what is not done yet.")

TRAINED = "fixed:2"  # how branches of training runs draft: the second tokens tell apart what the first do not
BENCHMARK = pathlib.Path(__file__).parent.parent / "infer" / "benchmark.py"


class Benchmark(NamedTuple):
    """One call of `infer/benchmark.py`. settings: its flags, but for the folder."""

    folder: pathlib.Path
    settings: dict[str, Any]

    def run(self) -> None:
        """Runs the benchmark, unless this very one is finished; raises UserError where it fails."""
        values = self.settings | {"output_dir": self.folder}
        arguments = [f"--{name}={value}" for name, value in values.items() if value is not None]
        finished = self.folder / "finished.json"
        if finished.exists() and json.loads(finished.read_text()) == arguments:
            return
        print(f"{self.folder}:", file=sys.stderr, flush=True)
        code = subprocess.run([sys.executable, BENCHMARK, *arguments], stdout=subprocess.DEVNULL).returncode
        if code:
            raise UserError(f"{self.folder}: infer/benchmark.py ended with exit code {code}; its own message is above")
        with files.whole_file(finished) as file:
            json.dump(arguments, file)

    def results(self) -> dict[str, Any] | None:
        """Reads its `results.json`, if there is one."""
        path = self.folder / "results.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def benchmark(prompts: str, name: str, **settings: Any) -> Benchmark:
    """Makes a benchmark with the settings that all share, in a folder of that name."""
    shared = {flag: FLAGS[flag].value for flag in ("model", "ngrams", "max_new_tokens", "max_draft", "limit")}
    return Benchmark(pathlib.Path(FLAGS.output_dir).expanduser() / name, {"prompts": prompts} | shared | settings)


class Cell(NamedTuple):
    """The settings of one benchmark. arms: the sources of drafts, joined by +."""

    prompts: str
    temperature: str
    batch_size: str
    arms: str

    def benchmark(self) -> Benchmark:
        lengths = range(1, FLAGS.max_draft + 1) if FLAGS.fixed is None else FLAGS.fixed
        names = [f"fixed:{length}" for length in lengths] + FLAGS.controllers
        if self.arms == "lookup":
            names = [name for name in names if not parse_controller(name, FLAGS.max_draft).controller.needs_branch]
        return benchmark(
            self.prompts,
            f"{pathlib.Path(self.prompts).stem}/temperature_{self.temperature}_batch_{self.batch_size}_{self.arms}",
            exit_branch=FLAGS.exit_branch,
            arms=self.arms.replace("+", ","),
            controllers=",".join([PLAIN, *names]),
            temperature=self.temperature,
            batch_size=self.batch_size,
            ignore_eos=self.ignores_eos or None,
        )

    @property
    def ignores_eos(self) -> bool:
        """Says whether EOS is ignored: sampled answers end by chance, and a batch takes as long as its longest."""
        return float(self.temperature) > 0 and int(self.batch_size) > 1


def all_cells() -> list[Cell]:
    """Lists all cells; those that say most come first."""
    sources = ("lookup",) if FLAGS.exit_branch == "none" else ("+".join(ARMS), *ARMS)
    return [Cell(*parts) for parts in itertools.product(FLAGS.prompts, FLAGS.temperatures, FLAGS.batch_sizes, sources)]


def of_all(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Finds the rows of all prompts together, by controller."""
    return {row["controller"]: row for row in results["rows"] if row["category"] == ALL}


def headline(found: dict[Cell, dict[str, Any]]) -> str:
    """Makes the table of the default controller in every setting."""
    header = ("T", "batch", "drafts from", "plain, tokens/s", "tokens/s", "speed-up", "scored", "tokens/round", "acceptance", "identical")
    lines = []
    for cell, results in found.items():
        rows = of_all(results)
        ours = rows[DEFAULT_CONTROLLER]
        same = "-" if ours["identical"] is None else f"{ours['identical']} of {ours['answers']}"
        figures = [figure(ours[name]) for name in ("speedup", "scored_speedup", "tokens_per_round", "acceptance_rate")]
        speeds = [figure(row["tokens_per_second"], ".1f") for row in (rows[PLAIN], ours)]
        lines.append((cell.temperature, cell.batch_size, cell.arms, *speeds, *figures, same))
    return table(header, lines)


def categories_of(found: dict[Cell, dict[str, Any]]) -> list[str]:
    """Lists the categories in the order of the prompts, all of them together last."""
    return list(dict.fromkeys(row["category"] for results in found.values() for row in results["rows"]))


def by_category(found: dict[Cell, dict[str, Any]], field: str) -> str:
    """Makes the table of one figure of the default controller, by setting and category."""
    categories = categories_of(found)
    lines = []
    for cell, results in found.items():
        rows = {row["category"]: row for row in results["rows"] if row["controller"] == DEFAULT_CONTROLLER}
        lines.append((cell.temperature, cell.batch_size, cell.arms, *(figure(rows[name][field]) for name in categories)))
    return table(("T", "batch", "drafts from", *categories), lines)


def against_fixed(found: dict[Cell, dict[str, Any]], field: str) -> str:
    """Makes the table of a speed-up of all controllers, relative to the fixed length (plain decoding is length 0) that was best by it."""
    names = list(dict.fromkeys(name for results in found.values() for name in of_all(results) if not is_fixed(name)))
    lines = []
    for cell, results in found.items():
        rows = of_all(results)
        best = max(filter(is_fixed, rows), key=lambda name: rows[name][field])
        shares = [figure(rows[name][field] / rows[best][field]) if name in rows else "-" for name in names]
        lines.append((cell.temperature, cell.batch_size, cell.arms, f"{best}: {rows[best][field]:.2f}", *shares))
    return table(("T", "batch", "drafts from", "best fixed length", *names), lines)


def is_fixed(name: str) -> bool:
    return name == PLAIN or name.startswith("fixed:")


def speeds_by_batch(found: dict[Cell, dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Collects the default controller's speed-up by batch size, for each temperature and source of drafts."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for cell, results in sorted(found.items(), key=lambda entry: int(entry[0].batch_size)):
        point = int(cell.batch_size), of_all(results)[DEFAULT_CONTROLLER]["speedup"]
        lines.setdefault(f"T = {cell.temperature}, {cell.arms}", []).append(point)
    return lines


def read_training(label: str, folder: pathlib.Path) -> dict[str, Any]:
    """Reads the results of a run of `train/distill.py`: its evaluations, and the settings that are kept with its branch."""
    try:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        info = json.loads((folder / "exit_branch" / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"--training: {label}={folder} cannot be read ({error}); expected the output_dir of a finished training run"
        ) from None
    seen, run = 0, {"positions": [], "agreement": [], "info": info}
    for line in lines:
        seen += line.get("positions", 0)
        if "held_out/agreement" in line:
            run["positions"].append(seen)
            run["agreement"].append(line["held_out/agreement"])
            run["last"] = line
    return run


def training_benchmark(label: str, folder: pathlib.Path) -> Benchmark:
    """Makes the benchmark of a training run's branch, drafting alone, greedy."""
    prompts = FLAGS.training_prompts or FLAGS.prompts[0]
    name = f"training/{urllib.parse.quote(label, safe=' ')}"  # no two labels share a folder
    return benchmark(prompts, name, exit_branch=folder / "exit_branch", arms="exit", controllers=f"{PLAIN},{TRAINED}", temperature=0)


def training_table(runs: dict[str, dict[str, Any]]) -> str:
    """Makes the table of what each run reached on held-out text of its own."""
    header = ("run", "N", "start", "draft vocabulary", "response tokens", "positions seen", "loss", "agreement", "overlap", "tokens/round")
    lines = []
    for label, run in runs.items():
        info, last = run["info"], run["last"]
        counts = (f"{info['training']['response_tokens']:,}", f"{run['positions'][-1]:,}")
        figures = (figure(last.get(f"held_out/{name}"), ".3f") for name in ("loss", "agreement", "overlap", "tokens_per_round"))
        lines.append((label, str(info["exit_layer"]), info["start"], str(info["draft_vocab_size"]), *counts, *figures))
    return table(header, lines)


def trained_table(found: dict[str, dict[str, Any]]) -> str:
    """Makes the table of what the branches reached on the same prompts, each drafting alone."""
    header = ("run", "first drafts accepted", "second ones", "acceptance", "tokens/round", "scored", "identical")
    lines = []
    for label, results in found.items():
        row = of_all(results)[TRAINED]
        by_place = [figure(share) for share in row["acceptance_by_position"][:2]]
        figures = [figure(row[name]) for name in ("acceptance_rate", "tokens_per_round", "scored_speedup")]
        lines.append((label, *by_place, *figures, f"{row['identical']} of {row['answers']}"))
    return table(header, lines)


def write(found: dict[Cell, dict[str, Any]], runs: dict[str, dict[str, Any]], trained: dict[str, dict[str, Any]]) -> None:
    """Writes the document and its plots.

    Args:
      found: results of the benchmarks.
      runs: training runs by label.
      trained: results of benchmarks of their branches, by label.
    """
    document = pathlib.Path(FLAGS.report).expanduser()
    images: dict[str, str] = {}
    sections = ["# Report"]
    if found:
        sections.append(introduction(next(iter(found.values()))))
    for prompts, cells in itertools.groupby(found, key=lambda cell: cell.prompts):
        part = {cell: found[cell] for cell in cells}
        stem = pathlib.Path(prompts).stem
        sections += [f"## {stem}", f"### {DEFAULT_CONTROLLER}, the default", headline(part)]
        if len({cell.batch_size for cell in part}) > 1:
            images[f"{stem}_batches.svg"] = plots.batches(speeds_by_batch(part), f"{DEFAULT_CONTROLLER} over plain decoding, {stem}")
            sections += [f"![Speed-up against batch size]({document.stem}/{stem}_batches.svg)"]
        if len(categories_of(part)) > 2:  # more than one, and all of them together
            for title, field in (("Speed-up", "speedup"), ("Tokens per round", "tokens_per_round"), ("Acceptance", "acceptance_rate")):
                sections += [f"### {title} by category", by_category(part, field)]
        if swept := {cell: results for cell, results in part.items() if any(name.startswith("fixed:") for name in of_all(results))}:
            sections += ["### Controllers, relative to the best fixed length", against_fixed(swept, "speedup")]
            sections += ["### The same, by their scores", against_fixed(swept, "scored_speedup")]
    if runs:
        curves = {label: list(zip(run["positions"], run["agreement"], strict=True)) for label, run in runs.items()}
        images["training.svg"] = plots.learning(curves)
        sections += ["## Training", training_table(runs), f"![Agreement against training]({document.stem}/training.svg)"]
    if trained:
        results = next(iter(trained.values()))
        prompts = pathlib.Path(results["settings"]["prompts"]).stem
        sections += [f"### The branches alone, {TRAINED}, on {prompts}", f"{model_and_machine(results)}; greedy.", trained_table(trained)]
    folder = document.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    for name, image in images.items():
        with files.whole_file(folder / name) as file:
            file.write(image)
    with files.whole_file(document) as file:
        file.write("\n\n".join(sections) + "\n")


def introduction(results: dict[str, Any]) -> str:
    """Writes the sentences that say what ran, on which machine, with which settings."""
    settings = results["settings"]
    return (
        f"{model_and_machine(results)}; at most {settings['max_new_tokens']} new tokens and {settings['max_draft']} drafts in a round. "
        "Every answer is interleaved with plain decoding's. Scored: the logged rounds priced with the measured cost of a round. Sampled "
        "answers of a batch ignore EOS, because it takes as long as its longest. Made by `benchmarks/report.py`."
    )


def main(argv: Sequence[str]) -> None:
    del argv
    if not FLAGS.prompts:
        raise UserError("--prompts is missing; expected files of prompts")
    pairs = [entry.rpartition("=")[::2] for entry in FLAGS.training]
    if wrong := [folder for label, folder in pairs if not label or not folder]:
        raise UserError(f"--training is {wrong[0]!r}; expected LABEL=FOLDER")
    folders = {label: pathlib.Path(folder).expanduser() for label, folder in pairs}
    if len(folders) < len(pairs):
        raise UserError(f"--training is {','.join(FLAGS.training)!r}; expected labels that differ")
    runs = {label: read_training(label, folder) for label, folder in folders.items()}
    cells = {cell: cell.benchmark() for cell in all_cells()}
    branches = {label: training_benchmark(label, folder) for label, folder in folders.items()}
    if FLAGS.run:
        for one in (*cells.values(), *branches.values()):
            one.run()
    found = {cell: results for cell, one in cells.items() if (results := one.results()) is not None}
    trained = {label: results for label, one in branches.items() if (results := one.results()) is not None}
    if not found and not runs:
        raise UserError(
            f"--output_dir is {FLAGS.output_dir!r}, and there is nothing in it to report on; expected finished benchmarks, or --run"
        )
    write(found, runs, trained)
    of_runs = f"{len(runs)} training runs ({len(trained)} of their branches drafted)"
    print(f"[{FLAGS.report} reports on {len(found)} of {len(cells)} benchmarks and {of_runs}]", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main)
