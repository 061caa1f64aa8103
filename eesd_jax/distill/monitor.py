"""What a training run shows: a progress bar, `metrics.jsonl`, TensorBoard events, and curves at the end.

`metrics.jsonl` has a line a step (`loss`, `agreement`, `overlap`, `coverage`, `positions`, `grad_norm`, `param_norm`, `learning_rate`,
`tokens_per_second`, and `mfu` where the device's peak is known) and a line an evaluation (names begin with `held_out/`). A resumed run
first drops the lines behind its checkpoint.
"""

import json
import sys
import time
from collections.abc import Iterable
from typing import Any

from etils import epath
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter

from eesd_jax import files
from eesd_jax.bench import plots

METRICS_NAME = "metrics.jsonl"
PLOT_NAME = "training.png"
_HELD_OUT = "held_out/"
_SMOOTHING = 0.95
_TENSORBOARD_EVERY = 10


class Monitor:
    """A context; does nothing in processes other than the first.

    Attributes:
      positions: loss positions that all steps so far have seen, also those before a resume.
    """

    def __init__(self, output: epath.Path, steps: int, *, writes: bool):
        self._output, self._steps, self._writes = output, steps, writes
        self._records: list[dict[str, Any]] = []
        self._progress: Progress | None = None
        self._written = 0  # records
        self._events: SummaryWriter | None = None
        self._task: TaskID | None = None
        self._rate = 0.0
        self._last: float | None = None
        self.positions = 0

    def __enter__(self) -> "Monitor":
        if self._writes:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[text]}"),
            )
            console = Console(stderr=True)
            self._progress = Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty())
            self._progress.start()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._progress is not None:
            self._progress.stop()
        if self._events is not None:
            self.flush()
            self._events.close()

    def follow(self, what: str, counts: Iterable[int], total: int, start: int, tokens_each: int) -> None:
        """Shows how far something of `total` items has come that yields its count."""
        began = time.perf_counter()
        task = self._progress.add_task(what, total=total, completed=start, text="") if self._progress else None
        count = start
        for count in counts:
            rate = (count - start) * tokens_each / (time.perf_counter() - began)
            if task is not None:
                self._progress.update(task, completed=count, text=f"{rate:,.0f} tokens/s")
        if task is not None:
            self._progress.remove_task(task)
            seconds = time.perf_counter() - began
            self.say(f"{what}: {count - start} rows in {seconds:.0f} s, {(count - start) * tokens_each / max(seconds, 1e-9):,.0f} tokens/s")

    def start(self, done: int, *, evaluated: bool) -> None:
        """Before the first step of this process, with `done` steps behind it. evaluated: whether the last of them was followed by one."""
        if not self._writes:
            return
        path = self._output / METRICS_NAME
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    record = json.loads(line)
                except ValueError:  # the last line of a run that was killed
                    continue
                is_evaluation = any(name.startswith(_HELD_OUT) for name in record)
                if record["step"] < done or (record["step"] == done and (evaluated or not is_evaluation)):
                    self._records.append(record)
        self.positions = sum(record.get("positions", 0) for record in self._records)
        with files.replaced(path) as partial:
            self._append(partial)
        self._events = SummaryWriter(str(self._output / "tensorboard"), purge_step=done + 1)
        self._task = self._progress.add_task("distilling", total=self._steps, completed=done, text="")
        if done:
            self.say(f"resumed behind step {done}")

    def step(self, at: int, values: dict[str, float], tokens: int, flops: float, peak: float | None) -> None:
        """Metrics of a step that has ended. tokens: that it read. flops: a token costs. peak: flops a second of all devices, if known."""
        if not self._writes:
            return
        now = time.perf_counter()
        if self._last is not None:
            rate = tokens / (now - self._last)
            self._rate = rate if not self._rate else _SMOOTHING * self._rate + (1 - _SMOOTHING) * rate
            values = values | {"tokens_per_second": round(self._rate, 1)}
            if peak:
                values["mfu"] = round(self._rate * flops / peak, 4)
        self._last = now
        positions = int(values["positions"])
        self.positions += positions
        self._records.append({"step": at} | {name: _rounded(value) for name, value in values.items()} | {"positions": positions})
        if at % _TENSORBOARD_EVERY == 0 or at == self._steps:
            self.flush()
            for name, value in values.items():
                self._events.add_scalar(name, value, at)
        text = (
            f"loss {values['loss']:.3f}  agreement {values['agreement']:.3f}  overlap {values['overlap']:.3f}  {self._rate:,.0f} tokens/s"
        )
        self._progress.update(self._task, completed=at, text=text + (f"  mfu {values['mfu']:.1%}" if "mfu" in values else ""))

    def evaluation(self, at: int, values: dict[str, float]) -> None:
        """What was found on held-out text behind a step."""
        self._last = None  # its time is not the next step's
        if not self._writes or not values:
            return
        self._records.append({"step": at} | {f"{_HELD_OUT}{name}": _rounded(value) for name, value in values.items()})
        self.flush()
        for name, value in values.items():
            self._events.add_scalar(f"{_HELD_OUT}{name}", value, at)
        rate = f", {self._rate:,.0f} tokens/s" if self._rate else ""
        self.say(f"step {at}: " + ", ".join(f"{name} {value:.3f}" for name, value in values.items()) + rate)

    def say(self, text: str) -> None:
        """One line on stderr, above the progress bar."""
        if self._writes:
            self._progress.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def plot(self) -> None:
        """Draws the curves of the whole run."""
        if self._writes:
            self.flush()
            (self._output / PLOT_NAME).write_bytes(plots.training(self._records))

    def flush(self) -> None:
        """Writes the lines of all steps that have ended."""
        if self._writes:
            self._append(self._output / METRICS_NAME)

    def _append(self, path: epath.Path) -> None:
        text = "".join(json.dumps(record) + "\n" for record in self._records[self._written :])
        self._written = len(self._records)
        if text:
            with path.open("a") as file:
                file.write(text)


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
