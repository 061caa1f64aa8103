"""`benchmarks/report.py`: a document of what the benchmarks found, which runs nothing twice."""

import json
import pathlib
import re
import subprocess
import sys
import xml.etree.ElementTree

import pytest

ROOT = pathlib.Path(__file__).parent.parent


def report(folder: pathlib.Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """One small benchmark of a random model, which lookup alone drafts for."""
    settings = ["--model=tiny", "--exit_branch=none", "--temperatures=0", "--batch_sizes=2", "--max_draft=3", "--max_new_tokens=8"]
    settings += ["--fixed=1,3"]
    places = (f"--prompts={folder / 'questions.jsonl'}", f"--output_dir={folder / 'runs'}", f"--report={folder / 'report.md'}")
    command = [sys.executable, "benchmarks/report.py", *settings, *places, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("report")
    records = [{"id": i, "category": ["one", "two"][i % 2], "turns": ["a b a b a b a b"]} for i in range(4)]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, records)))
    training = folder / "training"
    (training / "exit_branch").mkdir(parents=True)
    lines = [{"step": 1, "positions": 100}, {"step": 2, "positions": 150}]
    lines += [{"step": 2, "held_out/agreement": 0.25, "held_out/loss": 3.5, "held_out/overlap": 0.2, "held_out/tokens_per_round": 1.3}]
    (training / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    info = {"exit_layer": 2, "start": "next", "draft_vocab_size": 64, "training": {"response_tokens": 1234}}
    (training / "exit_branch" / "config.json").write_text(json.dumps(info))
    return folder


@pytest.mark.slow
def test_the_document_says_what_was_found_and_nothing_runs_twice(folder):
    training = f"--training=first try={folder / 'training'}"
    first = report(folder, training)
    assert first.returncode == 0, first.stderr
    (results,) = folder.rglob("results.json")
    rows = {(row["controller"], row["category"]): row for row in json.loads(results.read_text())["rows"]}
    text = (folder / "report.md").read_text()
    fixed = {name for name, _ in rows if name.startswith("fixed")}
    assert fixed == {"fixed:1", "fixed:3"}
    ours = rows["cost_aware", "all"]
    assert f"{ours['identical']} of 4" in text
    for figure in (ours["speedup"], ours["scored_speedup"], rows["cost_aware", "two"]["tokens_per_round"]):
        assert f"{figure:.2f}" in text
    for field in ("speedup", "scored_speedup"):
        best = max(("plain", *sorted(fixed)), key=lambda name: rows[name, "all"][field])
        assert f"| {best}: {rows[best, 'all'][field]:.2f} | " in re.sub(" +", " ", text)
        assert f"{ours[field] / rows[best, 'all'][field]:.2f}" in text
    cells = next(line for line in text.splitlines() if line.startswith("| first try")).split("|")
    assert [cell.strip() for cell in cells[2:-1]] == ["2", "next", "64", "1,234", "250", "3.500", "0.250", "0.200", "1.300"]
    for name in ("questions_batches", "training"):
        assert f"](report/{name}.svg)" in text
        assert xml.etree.ElementTree.parse(folder / "report" / f"{name}.svg").getroot().tag.endswith("svg")
    # Once more: the benchmark is not started, and every file is what it was.
    before = {path: path.stat().st_mtime_ns for path in (folder / "runs").rglob("*")}
    files = {path: path.read_bytes() for path in (folder / "report").iterdir()}
    assert report(folder, training).returncode == 0
    assert before == {path: path.stat().st_mtime_ns for path in (folder / "runs").rglob("*")}
    assert files == {path: path.read_bytes() for path in (folder / "report").iterdir()}
    assert (folder / "report.md").read_text() == text


def test_mistakes_end_with_one_line(folder):
    for arguments, words in (
        (["--training=runs/a"], "expected LABEL=FOLDER"),
        ([f"--training=a={folder}"], "cannot be read"),
        ([f"--output_dir={folder / 'nothing'}", "--norun"], "nothing in it to report on"),
    ):
        result = report(folder, *arguments)
        assert result.returncode == 2
        assert len(result.stderr.strip().splitlines()) == 1
        assert words in result.stderr
