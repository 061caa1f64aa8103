"""Times the writing of text and the training of a branch, from a cache and online, on the built-in model.

    python benchmarks/training.py
    python benchmarks/training.py --modes=cached --chunks=64,256,512 --train_head --output=training.json
    python benchmarks/training.py --responses=96 --prompts=questions.jsonl                # the whole pipeline, in tokens an hour

With `--responses` so many are written by `train/self_generate.py`'s own code, with and without features kept, after a warm-up that
compiles. The pipeline's rate counts response tokens that are written, cached and trained on once; its time includes the prompts, but not
the copying of kept features into the cache.

Rows are filled with random tokens, which does not change the speed. The trainer's own work is timed: reading a batch (and its
features, memory-mapped), placing it, and the jitted step; not evaluations and checkpoints. Writing the cache is timed as well: a run does
it once. Settings of one mode take turns, so that a drift of the machine's speed cancels; medians count.
"""

import dataclasses
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from etils import epath

from eesd_jax import cli, files
from eesd_jax.bench import report
from eesd_jax.config import ExperimentConfig, SelfGenerateConfig
from eesd_jax.distill import examples
from eesd_jax.distill.layout import make_layout
from eesd_jax.distill.monitor import Monitor
from eesd_jax.distill.self_generate import Summary, self_generate
from eesd_jax.distill.teacher import FeatureCache
from eesd_jax.distill.trainer import Run
from eesd_jax.engine.engine import use_compilation_cache
from eesd_jax.errors import UserError
from eesd_jax.weights.branch_folder import config_hash
from eesd_jax.weights.load import LoadedModel, load_model

FLAGS = flags.FLAGS
MODES = ("cached", "online")
flags.DEFINE_string("model", "demo", "As for infer/generate.py.")
flags.DEFINE_string("dtype", "", "Of the trunk: float32 or bfloat16; by default the device's own.")
flags.DEFINE_list("modes", list(MODES), "What is measured: cached, online or both.")
flags.DEFINE_integer("exit_layer", 4, "Blocks before the branch.")
flags.DEFINE_integer("draft_vocab", 8192, "Tokens that the branch can draft; 0 for all.")
flags.DEFINE_bool("train_head", False, "Whether the branch's head is trained, too.")
flags.DEFINE_integer("batch_size", 8, "Rows of a step.")
flags.DEFINE_integer("sequence_length", 512, "Tokens of a row.")
flags.DEFINE_integer("top_tokens", 16, "Tokens that the cache keeps at each position.")
flags.DEFINE_list("chunks", ["64"], "Positions of every row whose logits exist at once.")
flags.DEFINE_integer("steps", 4, "Steps that are timed together.")
flags.DEFINE_integer("repeats", 3, "Times that they are timed; the median counts.")
flags.DEFINE_integer("responses", 0, "Responses that are written; 0: writing is not measured.")
flags.DEFINE_string("prompts", "self", "What they answer: as config.self_generate.prompts.")
flags.DEFINE_integer("rows", 24, "Responses that are written at once.")
flags.DEFINE_string("output", None, "File to write the result to (JSON).")


def write_random_rows(folder: str, model: LoadedModel, count: int, length: int) -> None:
    """Writes a dataset whose every example fills a row, and is a response from its second token on."""
    rng = np.random.default_rng(0)
    provenance = {
        "model": FLAGS.model,
        "vocab_size": model.config.vocab_size,
        "tokenizer_hash": examples.tokenizer_hash(model.tokenizer),
        "target_config_hash": config_hash(model.config),
    }
    records = (
        {
            "tokens": rng.integers(0, model.config.vocab_size, length, np.int32),
            "response": np.arange(length) > 0,
            "index": i,
            "temperature": 1.0,
            "prompt_id": str(i),
        }
        for i in range(count)
    )
    examples.write_dataset(epath.Path(folder), {"train": records}, provenance)


def experiment(folder: str, mode: str, chunk: int) -> ExperimentConfig:
    """Makes the experiment that the flags ask for."""
    config = ExperimentConfig(model=FLAGS.model, output_dir=f"{folder}/{mode}", dtype=FLAGS.dtype, batch_size=FLAGS.batch_size)
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, path=f"{folder}/dataset", sequence_length=FLAGS.sequence_length),
        branch=dataclasses.replace(config.branch, exit_layer=FLAGS.exit_layer, draft_vocab=FLAGS.draft_vocab, train_head=FLAGS.train_head),
        loss=dataclasses.replace(config.loss, chunk=chunk),
        cache=dataclasses.replace(config.cache, enabled=mode == "cached", top_tokens=FLAGS.top_tokens),
    )


class Setting:
    """One mode and chunk, ready to be timed again and again."""

    def __init__(self, run: Run, cache: FeatureCache | None):
        self._run, self._cache = run, cache
        self._step, self._state = run.compile_step(), run.initial
        self.flops = run.token_flops

    def time(self, steps: int) -> float:
        """Times that many steps, reading their batches included."""
        began = time.perf_counter()
        for item in self._run.read_ahead(self._run.new_loader(), self._cache, steps):
            self._state, metrics = self._step(self._state, item)
        jax.block_until_ready((self._state, metrics))
        return time.perf_counter() - began


def measure(folder: str, mode: str, chunks: Sequence[int]) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """Times every chunk size, a row each; also the writing of the cache, where there is one."""
    settings, filling = [], None
    for chunk in chunks:
        config = experiment(folder, mode, chunk)
        layout = make_layout(config)
        dtype = config.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
        run = Run(config, epath.Path(config.output_dir), layout, load_model(config.model, jnp.dtype(dtype), layout.mesh))
        cache = None
        if mode == "cached":
            began = time.perf_counter()
            cache = run.fill_caches(Monitor(run.output, 1, writes=False))["train"]
            seconds = time.perf_counter() - began
            filling = filling or {"tokens": len(run.rows) * FLAGS.sequence_length, "seconds": seconds}
        settings.append(Setting(run, cache))
        settings[-1].time(1)  # compiles
    times: list[list[float]] = [[] for _ in settings]
    for _ in range(FLAGS.repeats):
        for setting, found in zip(settings, times, strict=True):
            found.append(setting.time(FLAGS.steps))
    tokens = FLAGS.steps * FLAGS.batch_size * FLAGS.sequence_length
    rows = []
    for chunk, setting, found in zip(chunks, settings, times, strict=True):
        rate = tokens / statistics.median(found)
        rows.append({"mode": mode, "chunk": chunk, "tokens_per_second": rate, "gflops": rate * setting.flops / 1e9})
    return rows, filling


class Writing(NamedTuple):
    """How fast text was written. rate: response tokens a second. positions: tokens of prompt and response for each of them."""

    rate: float
    positions: float


def measure_writing(folder: str, features: bool) -> Writing:
    """Writes responses, all sampled; what is timed begins when the model is loaded."""
    config = experiment(folder, "cached", 64)

    def write(name: str, count: int) -> Summary:
        ours = SelfGenerateConfig(FLAGS.prompts, count, 256, 192, greedy_share=0.0, batch_size=FLAGS.rows, features=features)
        return self_generate(dataclasses.replace(config, output_dir=f"{folder}/{name}-{features}", self_generate=ours))

    write("warm-up", FLAGS.rows)
    summary = write("written", FLAGS.responses)
    with open(f"{summary.folder}/metadata.json") as file:
        provenance = json.load(file)["provenance"]
    return Writing(summary.tokens / summary.seconds, 1 + provenance["prompt_tokens"] / provenance["response_tokens"])


def pipeline(writing: dict[bool, Writing], caching: float, training: float) -> list[tuple[str, str, str]]:
    """Makes the lines of a table: response tokens a second as they are written, and those an hour through all of it."""
    lines = []
    for features, (rate, positions) in writing.items():
        seconds = 1 / rate + positions * ((0 if features else 1 / caching) + 1 / training)
        lines.append(("kept as it is written" if features else "a pass of its own", f"{rate:,.0f}", f"{3600 / seconds:,.0f}"))
    return lines


def main(argv: Sequence[str]) -> None:
    del argv
    for name in FLAGS.modes:
        if name not in MODES:
            raise UserError(f"--modes has {name!r}; expected {' or '.join(MODES)}")
    chunks = [int(chunk) for chunk in FLAGS.chunks if chunk.isdigit() and int(chunk) > 0]
    if len(chunks) != len(FLAGS.chunks) or not chunks:
        raise UserError(f"--chunks is {','.join(FLAGS.chunks)!r}; expected positive integers")
    if FLAGS.responses and "cached" not in FLAGS.modes:
        raise UserError(f"--responses is {FLAGS.responses} with --modes={','.join(FLAGS.modes)}; expected cached among the modes")
    use_compilation_cache()
    warnings.simplefilter("ignore", UserWarning)
    rows, filling, writing = [], None, {}
    with tempfile.TemporaryDirectory() as folder:
        write_random_rows(f"{folder}/dataset", load_model(FLAGS.model, jnp.dtype("bfloat16")), 2 * FLAGS.batch_size, FLAGS.sequence_length)
        for mode in FLAGS.modes:
            found, took = measure(folder, mode, chunks)
            rows, filling = rows + found, filling or took
        if FLAGS.responses:
            writing = {features: measure_writing(folder, features) for features in (False, True)}
    lines = [(row["mode"], str(row["chunk"]), f"{row['tokens_per_second']:,.0f}", f"{row['gflops']:.0f}") for row in rows]
    print(report.table(("mode", "chunk", "tokens/s", "GFLOP/s"), lines))
    if filling:
        rate = filling["tokens"] / filling["seconds"]
        print(
            f"\nwriting the cache: {filling['tokens']:,} tokens in {filling['seconds']:.0f} s, {rate:,.0f} tokens/s, compilation included"
        )
    if writing:
        rate = max(row["tokens_per_second"] for row in rows if row["mode"] == "cached")
        lines = pipeline(writing, filling["tokens"] / filling["seconds"], rate)
        print("\n" + report.table(("features", "written, tokens/s", "written, cached and trained on once, tokens/h"), lines))
    if FLAGS.output:
        shown = ("model", "exit_layer", "draft_vocab", "train_head", "batch_size", "sequence_length", "top_tokens", "steps", "repeats")
        settings = {name: FLAGS[name].value for name in shown} | {"device": jax.devices()[0].device_kind}
        written = [{"features": features} | found._asdict() for features, found in writing.items()]
        with files.whole_file(FLAGS.output) as file:
            json.dump({"settings": settings, "rows": rows, "cache": filling, "writing": written}, file, indent=2)


if __name__ == "__main__":
    cli.run(main)
