"""`benchmarks/report.py`: a document of what the benchmarks found, which runs nothing twice."""

import json
import pathlib
import re
import subprocess
import sys
import xml.etree.ElementTree

import commands
import pytest

from eesd_jax.bench.report import figure

ROOT = pathlib.Path(__file__).parent.parent.parent


def flags_of(folder: pathlib.Path, *arguments: str) -> list[str]:
    """Two small benchmarks of a random model, which lookup alone drafts for."""
    settings = ["--model=tiny", "--exit_branch=none", "--temperatures=0", "--batch_sizes=1,2", "--max_draft=3", "--max_new_tokens=8"]
    settings += ["--fixed=1,3"]
    places = (f"--prompts={folder / 'questions.jsonl'}", f"--output_dir={folder / 'runs'}", f"--report={folder / 'report.md'}")
    return [*settings, *places, *arguments]


def report(folder: pathlib.Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "benchmarks/report.py", *flags_of(folder, *arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("report")
    records = [{"id": i, "category": ["one", "two"][i % 2], "turns": ["a b a b a b a b"]} for i in range(4)]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, records)))
    return folder


@pytest.fixture(scope="module")
def training(folder) -> pathlib.Path:
    """A run of `configs/tiny.py`, cut short."""
    settings = ("--config=configs/tiny.py", f"--config.output_dir={folder / 'training'}", "--config.steps=20")
    for script in ("train/self_generate.py", "train/distill.py"):
        subprocess.run([sys.executable, script, *settings], cwd=ROOT, capture_output=True, check=True, timeout=300)
    return folder / "training"


@pytest.mark.slow
def test_the_document_says_what_was_found_and_nothing_runs_twice(folder, training):
    training_flag = f"--training=first try={training}"
    first = report(folder, training_flag)
    assert first.returncode == 0, first.stderr
    results, of_branch = (
        folder / "runs" / name / "results.json" for name in ("questions/temperature_0_batch_2_lookup", "training/first try")
    )
    rows = {(row["controller"], row["category"]): row for row in json.loads(results.read_text())["rows"]}
    text = (folder / "report.md").read_text()
    fixed = {name for name, _ in rows if name.startswith("fixed")}
    assert fixed == {"fixed:1", "fixed:3"}
    ours = rows["cost_aware", "all"]
    assert f"{ours['identical']} of 4" in text
    for value in (ours["speedup"], ours["scored_speedup"], rows["cost_aware", "two"]["tokens_per_round"]):
        assert figure(value) in text
    acceptance = text.partition("### Acceptance by category")[2].splitlines()[5]  # the second line of the table
    shares = [figure(rows["cost_aware", category]["acceptance_rate"]) for category in ("one", "two", "all")]
    assert [cell.strip() for cell in acceptance.split("|")[1:-1]] == ["0", "2", "lookup", *shares]
    for field in ("speedup", "scored_speedup"):
        best = max(("plain", *sorted(fixed)), key=lambda name: rows[name, "all"][field])
        assert f"| {best}: {rows[best, 'all'][field]:.2f} | " in re.sub(" +", " ", text)
        assert f"{ours[field] / rows[best, 'all'][field]:.2f}" in text
    # The run's own figures, and those of its branch, which drafts alone for the same prompts.
    lines = [json.loads(line) for line in (training / "metrics.jsonl").read_text().splitlines()]
    last, seen = lines[-1], sum(line.get("positions", 0) for line in lines)
    info = json.loads((training / "exit_branch" / "config.json").read_text())
    counts = [str(info["draft_vocab_size"]), f"{info['training']['response_tokens']:,}", f"{seen:,}"]
    figures = [f"{last[f'held_out/{name}']:.3f}" for name in ("loss", "agreement", "overlap", "tokens_per_round")]
    (alone,) = (row for row in json.loads(of_branch.read_text())["rows"] if (row["controller"], row["category"]) == ("fixed:2", "all"))
    shares = [f"{share:.2f}" for share in (*alone["acceptance_by_position"][:2], alone["acceptance_rate"], alone["tokens_per_round"])]
    cells = [[cell.strip() for cell in line.split("|")[2:-1]] for line in text.splitlines() if line.startswith("| first try")]
    assert cells == [["2", "next", *counts, *figures], [*shares, f"{alone['scored_speedup']:.2f}", f"{alone['identical']} of 4"]]
    for name in ("questions_batches", "training"):
        assert f"](report/{name}.svg)" in text
        assert xml.etree.ElementTree.parse(folder / "report" / f"{name}.svg").getroot().tag.endswith("svg")
    # Once more: the benchmark is not started, and every file is what it was.
    before = {path: path.stat().st_mtime_ns for path in (folder / "runs").rglob("*")}
    files = {path: path.read_bytes() for path in (folder / "report").iterdir()}
    assert report(folder, training_flag).returncode == 0
    assert before == {path: path.stat().st_mtime_ns for path in (folder / "runs").rglob("*")}
    assert files == {path: path.read_bytes() for path in (folder / "report").iterdir()}
    assert (folder / "report.md").read_text() == text
    # Of one batch size there is nothing to plot.
    assert report(folder, "--batch_sizes=2", "--norun", f"--report={folder / 'one_size.md'}").returncode == 0
    assert ours["answers"] == 4 and "| 2 |" in re.sub(" +", " ", (folder / "one_size.md").read_text())
    assert "batches.svg" not in (folder / "one_size.md").read_text() and not list((folder / "one_size").iterdir())


def test_mistakes_end_with_one_line(folder):
    with commands.loaded("benchmarks/report.py") as module:
        for arguments, words in (
            (["--training=runs/a"], "expected LABEL=FOLDER"),
            ([f"--training=a={folder}"], "cannot be read"),
            ([f"--training=a={folder},a={folder}"], "labels that differ"),
            ([f"--output_dir={folder / 'nothing'}", "--norun"], "nothing in it to report on"),
        ):
            commands.assert_refused(commands.run(module, *flags_of(folder, *arguments)), words)
