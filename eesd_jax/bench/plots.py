"""Draws a benchmark (speed-ups, acceptance, what controllers did on one prompt), several of them, and training runs."""

import io
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter

from eesd_jax.bench.record import Run
from eesd_jax.bench.report import ALL
from eesd_jax.decode.controllers import PLAIN

# Colours that can also be told apart by colour-blind readers (Okabe & Ito 2008).
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31")
_STYLES = ("o-", "s--", "^:")  # where there are more lines than colours
_DPI = 150
_SCORED = "scored"
_LABELLED_BARS = 12
_BAND = 0.8  # of a posterior, by probability


def draw_all(rows: Sequence[dict[str, Any]], runs: Sequence[Run]) -> dict[str, bytes]:
    """Draws all plots of a benchmark: PNG files by name.

    Args:
      rows: of `results.json`.
      runs: of the benchmark; the first turn of the first prompt is the one whose rounds are shown.
    """
    names = [name for name in dict.fromkeys(row["controller"] for row in rows) if name != PLAIN]
    colours = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(names)}
    if not names:
        return {}
    figures = {
        "speedup_by_category": _speedups(rows, colours),
        "accepted_lengths": _accepted_lengths(rows, colours),
        "acceptance_by_position": _acceptance_by_position(rows, colours),
    }
    first = [run for run in runs if (run.batch, run.turn) == (runs[0].batch, runs[0].turn) and run.controller in colours]
    figures["draft_length_over_rounds"] = _draft_lengths(first, colours)
    believers = [run for run in first if np.isfinite(run.answers[0].log.mean).any()]
    if believers:
        figures["posterior_over_rounds"] = _posteriors(believers, colours)
    return {f"{name}.png": _png(figure) for name, figure in figures.items()}


def training(records: Sequence[dict[str, Any]]) -> bytes:
    """Draws a training run's curves from the lines of its `metrics.jsonl`, as PNG: on training text (pale) and on held-out text (dots)."""
    panels = (("loss", "loss"), ("agreement", "agreement"), ("overlap", "overlap, 1 - TV"), ("tokens_per_round", "tokens per round"))
    figure = Figure((10.0, 6.5), layout="constrained")
    grid = figure.subplots(2, 2, sharex=True)
    for axes, (name, title), colour in zip(grid.ravel(), panels, _COLOURS, strict=False):
        for field, style in ((name, {"alpha": 0.35, "linewidth": 1.0}), (f"held_out/{name}", {"marker": "o", "markersize": 4})):
            points = [(record["step"], record[field]) for record in records if field in record]
            if points:
                axes.plot(*zip(*points, strict=True), color=colour, **style)
        axes.set(title=title)
        _plain_style(axes)
    for axes in grid[-1]:
        axes.set(xlabel="step", xlim=(0, None))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    figure.suptitle("on training text (pale) and on held-out text (dots)", fontsize="medium")
    return _png(figure)


def batches(lines: dict[str, Sequence[tuple[int, float]]], title: str) -> str:
    """Draws speed-ups against batch sizes, as SVG, a line for each label."""
    figure, axes = _axes(title, "batch size", "times as fast")
    _draw_lines(axes, lines)
    sizes = sorted({size for points in lines.values() for size, _ in points})
    axes.set(xscale="log")
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    axes.axhline(1, color="black", linewidth=1, linestyle="--")
    _legend(figure, axes)
    return _svg(figure)


def learning(lines: dict[str, Sequence[tuple[int, float]]]) -> str:
    """Draws agreement on held-out text against positions trained on, as SVG, a line for each training run."""
    figure, axes = _axes("Agreement on held-out text", "positions trained on", "same best token")
    _draw_lines(axes, lines)
    axes.set(xscale="log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    _legend(figure, axes)
    return _svg(figure)


def _draw_lines(axes: Axes, lines: dict[str, Sequence[tuple[int, float]]]) -> None:
    for i, (label, points) in enumerate(lines.items()):
        style = _STYLES[i // len(_COLOURS) % len(_STYLES)]
        axes.plot(*zip(*points, strict=True), style, color=_COLOURS[i % len(_COLOURS)], label=label)


def _svg(figure: Figure) -> str:
    """Writes a figure as SVG, the same text every time."""
    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": "eesd-jax", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
    return buffer.getvalue()


def _axes(title: str, x: str, y: str, width: float = 8.0, height: float = 4.5) -> tuple[Figure, Axes]:
    figure = Figure((width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set(title=title, xlabel=x, ylabel=y)
    _plain_style(axes)
    return figure, axes


def _plain_style(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)


def _legend(figure: Figure, axes: Axes) -> None:
    """Places the legend to the right of the axes, where it hides nothing."""
    handles, labels = axes.get_legend_handles_labels()
    entries = sorted(zip(labels, handles, strict=True), key=lambda entry: entry[0] == _SCORED)
    figure.legend([handle for _, handle in entries], [label for label, _ in entries], loc="outside right upper", frameon=False)


def _rounds_axis(axes: Axes, rounds: int) -> None:
    axes.set(xlabel="round", xlim=(0, rounds + 1))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))


def _grouped_bars(axes: Axes, groups: int, colours: dict[str, str], values: Callable[[str], Iterable[float]]) -> dict[str, np.ndarray]:
    """Draws a bar for each controller in each group; returns where they stand."""
    width = 0.8 / len(colours)
    places = {}
    for i, (name, colour) in enumerate(colours.items()):
        places[name] = np.arange(groups) + (i - (len(colours) - 1) / 2) * width
        axes.bar(places[name], list(values(name)), width * 0.92, color=colour, label=name)
    return places


def _speedups(rows: Sequence[dict[str, Any]], colours: dict[str, str]) -> Figure:
    categories = list(dict.fromkeys(row["category"] for row in rows))
    if len(categories) == 2:
        categories = [ALL]
    table = {(row["controller"], row["category"]): row for row in rows}
    width = max(7.0, 2.5 + 0.22 * len(colours) * len(categories))
    figure, axes = _axes("Speed-up over plain decoding", "", "times as fast", width)
    places = _grouped_bars(axes, len(categories), colours, lambda name: (table[name, category]["speedup"] for category in categories))
    for name in colours:
        scores = [table[name, category]["scored_speedup"] for category in categories]
        if None not in scores:
            label = _SCORED if name == list(colours)[-1] else None
            axes.plot(places[name], scores, "D", color="white", markeredgecolor="black", markersize=4.5, label=label)
    if len(colours) * len(categories) <= _LABELLED_BARS:
        for bars in axes.containers:
            axes.bar_label(bars, fmt="%.2f", label_type="center", color="white")
    axes.axhline(1, color="black", linewidth=1, linestyle="--")
    axes.set_xlim(-0.6, len(categories) - 0.4)
    axes.set_xticks(range(len(categories)), ["all prompts" if category == ALL else category for category in categories])
    if len(categories) > 6:
        axes.tick_params(axis="x", labelrotation=30)
    _legend(figure, axes)
    return figure


def _accepted_lengths(rows: Sequence[dict[str, Any]], colours: dict[str, str]) -> Figure:
    lengths = {row["controller"]: np.array(row["accepted_lengths"]) for row in rows if row["category"] == ALL}
    longest = max(len(lengths[name]) for name in colours)
    figure, axes = _axes("Drafts accepted in a round", "drafts accepted", "share of rounds")
    shares = {name: np.pad(lengths[name] / lengths[name].sum(), (0, longest - len(lengths[name]))) for name in colours}
    _grouped_bars(axes, longest, colours, shares.get)
    axes.set_xticks(range(longest))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    _legend(figure, axes)
    return figure


def _acceptance_by_position(rows: Sequence[dict[str, Any]], colours: dict[str, str]) -> Figure:
    shares = {row["controller"]: row["acceptance_by_position"] for row in rows if row["category"] == ALL}
    figure, axes = _axes("Acceptance by place in the draft", "place in the draft", "accepted, of those drafted there")
    for name, colour in colours.items():
        axes.plot(range(1, len(shares[name]) + 1), shares[name], "o-", color=colour, label=name)
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(figure, axes)
    return figure


def _posteriors(runs: Sequence[Run], colours: dict[str, str]) -> Figure:
    answer = runs[0].answers[0]
    figure, axes = _axes(f"Acceptance of a draft as the posterior has it, prompt {answer.id}", "", f"mean, and {_BAND:.0%} band")
    for run in runs:
        log, colour = run.answers[0].log, colours[run.controller]
        rounds = range(1, len(log.mean) + 1)
        axes.fill_between(rounds, *log.interval(_BAND), color=colour, alpha=0.15, linewidth=0)
        axes.plot(rounds, log.mean, color=colour, label=run.controller)
    axes.set_ylim(0, 1)
    _rounds_axis(axes, max(len(run.answers[0].log.mean) for run in runs))
    _legend(figure, axes)
    return figure


def _draft_lengths(runs: Sequence[Run], colours: dict[str, str]) -> Figure:
    """Draws a strip for each controller, because lines would hide each other."""
    order = list(colours)
    runs = sorted(runs, key=lambda run: order.index(run.controller))
    logs = {run.controller: run.answers[0].log for run in runs}
    figure = Figure((8.0, 1.2 + 1.2 * len(runs)), layout="constrained")
    strips = figure.subplots(len(runs), sharex=True, sharey=True, squeeze=False)[:, 0]
    for axes, (name, log) in zip(strips, logs.items(), strict=True):
        rounds = np.arange(1, len(log.drafted) + 1)
        axes.bar(rounds, log.drafted, 0.9, color=colours[name], alpha=0.3, linewidth=0)
        axes.bar(rounds, log.accepted, 0.9, color=colours[name], linewidth=0)
        axes.set_title(name, loc="left", fontsize="medium")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=4, steps=[1, 2, 4, 10]))
        _plain_style(axes)
    strips[-1].set_ylim(0, max(1, *(max(log.drafted) for log in logs.values())) * 1.05)
    _rounds_axis(strips[-1], max(len(log.drafted) for log in logs.values()))
    figure.supylabel("drafts", fontsize="medium")
    figure.suptitle(f"Drafts in each round (pale) and those accepted (full), prompt {runs[0].answers[0].id}")
    return figure
