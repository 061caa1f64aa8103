"""Writes what a benchmark found: `results.json` and `table.md`. Plots are left to `plots.py`.

Beside its measured speed, every controller has a score that is free of the machine's noise: the rounds that it logged, priced with the
measured cost of a round (`Costs`), against as many plain steps as plain decoding took. Prompt processing is part of the measured speed, not
of the score.
"""

import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from eesd_jax.bench.record import Costs, Divergence, Journal, Run
from eesd_jax.decode.controllers import PLAIN
from eesd_jax.engine.generation import Rounds

ALL = "all"
_FEW_DIVERGENCES = 20  # listed one by one
_LEGEND = (
    "Tokens/s: all tokens over all seconds, prompt processing included, compilation not. Scored: the same logged rounds, priced with the "
    "measured cost of a round, so that no noise of the clock is in it. Clairvoyant: the score had each round stopped just before the draft "
    "that was rejected; for fixed:MAX_DRAFT, a bound on what stopping can give."
)
_EXCUSED = "Excused: float32, and the logits of both tokens within 0.001 of the greatest, closer than passes of different widths agree."


def results(journal: Journal) -> dict[str, Any]:
    """Collects what `results.json` says of a finished benchmark, except for the machine."""
    settings, divergences = journal.settings, journal.divergences()
    options = {name: settings[name] for name in ("arms", "temperature", "batch_size")}
    return {
        "settings": settings,
        "costs": journal.costs and journal.costs._asdict(),
        "rows": result_rows(journal.runs(), divergences, journal.costs, **options),
        "divergences": [vars(divergence) for divergence in divergences],
    }


def result_rows(
    runs: Sequence[Run], divergences: Sequence[Divergence], costs: Costs | None, *, arms: str, temperature: float, batch_size: int
) -> list[dict[str, Any]]:
    """Makes a row for each controller and category, and for all categories together: total tokens over total seconds."""
    names = list(dict.fromkeys(run.controller for run in runs))
    names.sort(key=lambda name: name != PLAIN)
    categories = [*dict.fromkeys(run.category for run in sorted(runs, key=lambda run: run.batch) if run.category != ALL), ALL]
    rows = []
    for category in categories:
        chosen = [run for run in runs if category in (run.category, ALL)]
        plain = [run for run in chosen if run.controller == PLAIN]
        for name in names:
            ours = [run for run in chosen if run.controller == name]
            found = [d for d in divergences if d.controller == name and category in (d.category, ALL)]
            row = {"controller": name, "arms": "none" if name == PLAIN else arms, "category": category}
            row |= {"temperature": temperature, "batch_size": batch_size} | _speeds(ours, plain) | _statistics(ours)
            row |= _comparison(ours, found, greedy=temperature == 0) | _scores(ours, plain, costs)
            rows.append(row)
    return rows


def _speeds(ours: Sequence[Run], plain: Sequence[Run]) -> dict[str, float]:
    speed, plain_speed = (sum(run.tokens for run in runs) / sum(run.seconds for run in runs) for runs in (ours, plain))
    return {"tokens_per_second": round(speed, 3), "speedup": round(speed / plain_speed, 4)}


def _statistics(runs: Sequence[Run]) -> dict[str, Any]:
    answers = [answer for run in runs for answer in run.answers]
    rounds = Rounds.join([answer.log for answer in answers])
    tokens, drafted, accepted = (int(counts.sum()) for counts in (rounds.committed, rounds.tested, rounds.accepted))
    return {
        "tokens_per_round": round(tokens / len(rounds.committed), 4),
        "acceptance_rate": round(accepted / drafted, 4) if drafted else None,
        "mean_draft_length": round(drafted / len(rounds.committed), 4),
        "answers": len(answers),
        "tokens": tokens,
        "seconds": round(sum(run.seconds for run in runs), 4),
        "rounds": len(rounds.committed),
        "drafted": drafted,
        "accepted": accepted,
        "accepted_lengths": rounds.accepted_lengths().tolist(),
        "acceptance_by_position": rounds.acceptance_by_position().round(4).tolist(),
    }


def _comparison(runs: Sequence[Run], found: Sequence[Divergence], *, greedy: bool) -> dict[str, Any]:
    """Counts greedy answers that differ; None where tokens are sampled. `identical_to_plain` is strict: an excused divergence counts."""
    if not greedy:
        return {"identical_to_plain": None, "identical": None, "excused": None, "different": None, "divergence_gaps": None}
    answers, excused = sum(len(run.answers) for run in runs), sum(divergence.excused for divergence in found)
    return {
        "identical_to_plain": not found,
        "identical": answers - len(found),
        "excused": excused,
        "different": len(found) - excused,
        "divergence_gaps": sorted(round(divergence.gap, 6) for divergence in found),
    }


def _scores(ours: Sequence[Run], plain: Sequence[Run], costs: Costs | None) -> dict[str, float | None]:
    """Computes speed-ups by the cost table: of the logged rounds, and as if each had stopped just before the rejected draft."""
    if costs is None:
        return {"scored_speedup": None, "clairvoyant_speedup": None}
    plain_cost = sum(run.tokens for run in plain) / sum(costs.plain * _longest(run) for run in plain)
    scores = {}
    for score, field in (("scored_speedup", "drafted"), ("clairvoyant_speedup", "accepted")):
        seconds = sum(scored_seconds(run, costs, field) for run in ours)
        scores[score] = round(sum(run.tokens for run in ours) / seconds / plain_cost, 4)
    return scores if ours[0].controller != PLAIN else scores | {"clairvoyant_speedup": None}


def scored_seconds(run: Run, costs: Costs, field: str = "drafted") -> float:
    """Prices a run's rounds; a round of a batch costs as much as its longest row, and rows that are finished draft nothing.

    Args:
      field: the field of `Rounds` that a round is priced by.
    """
    if run.controller == PLAIN:
        return costs.plain * _longest(run)
    drafts = {source: np.zeros((len(run.answers), _longest(run)), np.int64) for source in ("branch", "lookup")}
    for i, answer in enumerate(run.answers):
        lengths, looked_up = getattr(answer.log, field), answer.log.looked_up
        drafts["branch"][i, : len(lengths)] = np.where(looked_up, 0, lengths)
        drafts["lookup"][i, : len(lengths)] = np.where(looked_up, lengths, 0)
    by_branch, by_lookup = (lengths.max(axis=0) for lengths in drafts.values())
    seconds = np.asarray(costs.rounds)[by_branch]
    if costs.look_up:
        # What the wider pass for looked-up drafts adds to a round in which the branch drafts for other rows.
        look_up = np.asarray(costs.look_up)
        seconds = seconds + look_up[by_lookup] - look_up[np.minimum(by_branch, by_lookup)]
    return float(np.sum(seconds))


def _longest(run: Run) -> int:
    return max(len(answer.log.committed) for answer in run.answers)


def to_text(results: dict[str, Any]) -> str:
    """Writes the text of `results.json`: one row a line."""
    head = {name: value for name, value in results.items() if name not in ("rows", "divergences")}
    lists = {name: results[name] for name in ("rows", "divergences")}
    parts = [f"  {json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}" for name, value in head.items()]
    for name, items in lists.items():
        lines = ",".join(f"\n    {json.dumps(item, ensure_ascii=False, allow_nan=False)}" for item in items)
        parts.append(f"  {json.dumps(name)}: [{lines}\n  ]" if items else f"  {json.dumps(name)}: []")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def to_markdown(results: dict[str, Any]) -> str:
    """Writes `table.md`: all prompts; speed-ups and tokens per round by category; where greedy answers differ from plain decoding's."""
    settings = results["settings"]
    length = "new tokens, EOS ignored" if settings["ignore_eos"] else "new tokens at most"
    sections = [
        "# Benchmark",
        f"{model_and_machine(results)}. Temperature {settings['temperature']:g}, batch size {settings['batch_size']}, "
        f"{settings['max_new_tokens']} {length}, {settings['conversations']} conversations of {settings['prompts']}.",
        *results["notes"],
        "## All prompts",
        summary(results["rows"]),
        _LEGEND,
    ]
    categories = list(dict.fromkeys(row["category"] for row in results["rows"]))
    if len(categories) > 2:
        for title, field in (("Speed-up", "speedup"), ("Scored speed-up", "scored_speedup"), ("Tokens per round", "tokens_per_round")):
            sections += [f"## {title} by category", _by_category(results["rows"], categories, field)]
    if found := results["divergences"]:
        sections += ["## Where greedy answers differ from plain decoding's", _divergences(results["rows"], found)]
    return "\n\n".join(sections) + "\n"


def model_and_machine(results: dict[str, Any]) -> str:
    """Begins a sentence that says which model ran on which machine."""
    machine = results["machine"]
    weights = ", its weights multiplied as the codes of their file" if machine.get("reads_codes") else ""
    return (
        f"Model {results['model']}, {machine['dtype']}{weights}, on {machine['devices']} x {machine['device']} ({machine['cpu']}, "
        f"{machine['cores']} cores), jax {machine['jax']}"
    )


def summary(rows: Iterable[dict[str, Any]]) -> str:
    """Makes the table of all prompts together."""
    header = ("controller", "arms", "tokens/s", "speed-up", "scored", "clairvoyant", "tokens/round", "acceptance", "draft length")
    header += ("identical / excused / different",)
    lines = []
    for row in rows:
        if row["category"] == ALL:
            same = row["identical"] is not None
            counts = f"{row['identical']} / {row['excused']} / {row['different']}" if same else "-"
            fields = ("speedup", "scored_speedup", "clairvoyant_speedup", "tokens_per_round", "acceptance_rate", "mean_draft_length")
            figures = (figure(row[field]) for field in fields)
            lines.append((row["controller"], row["arms"], f"{row['tokens_per_second']:.1f}", *figures, counts))
    return table(header, lines)


def _by_category(rows: Sequence[dict[str, Any]], categories: Sequence[str], field: str) -> str:
    values = {(row["controller"], row["category"]): row[field] for row in rows}
    names = dict.fromkeys(row["controller"] for row in rows)
    return table(("controller", *categories), [(name, *(figure(values[name, category]) for category in categories)) for name in names])


def _divergences(rows: Sequence[dict[str, Any]], found: Sequence[dict[str, Any]]) -> str:
    shares = [
        (
            row["controller"],
            f"{len(gaps) / row['answers']:.1%}",
            *(f"{value:.2g}" for value in (gaps[0], float(np.median(gaps)), gaps[-1])),
        )
        for row in rows
        if row["category"] == ALL and (gaps := row["divergence_gaps"])
    ]
    header = ("controller", "prompt", "turn", "position", "plain's top-2 logit gap", "excused")
    worst = sorted(found, key=lambda one: one["excused"])[:_FEW_DIVERGENCES]
    lines = [
        (one["controller"], str(one["id"]), str(one["turn"]), str(one["position"]), f"{one['gap']:.2g}", "yes" if one["excused"] else "no")
        for one in worst
    ]
    shown = "" if len(found) == len(worst) else f"\n\n{len(found) - len(worst)} more are in results.json."
    gaps = table(("controller", "answers that differ", "smallest gap", "median gap", "largest gap"), shares)
    return f"{gaps}\n\n{_EXCUSED}\n\n{table(header, lines)}{shown}"


def figure(value: float | None, form: str = ".2f") -> str:
    """Formats a number for a table; a dash where there is none."""
    return "-" if value is None else format(value, form)


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Makes a Markdown table that is also readable as text; the first column to the left, the others to the right."""
    lines = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]

    def row(cells: Sequence[str]) -> str:
        first, *others = (
            cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "| " + " | ".join((first, *others)) + " |"

    rule = "|".join(("-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])))
    return "\n".join((row(header), f"|{rule}|", *map(row, lines)))
