"""Compares plain decoding with transformers + PyTorch `generate`: same weights, same prompts, same run, float32, greedy.

    pip install -e ".[parity]"
    python benchmarks/plain_vs_transformers.py

They take turns prompt by prompt, so that a drift of the machine's speed cancels. This project runs twice: with the weights as their file
stores them (4- and 8-bit codes), and with float32 weights. A memory bound is the time to read all weights
once a token at the bandwidth measured in the same run. Batch 16 is compared with this project's own batch 1.
"""

import collections
import json
import statistics
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import torch
import torch_reference
from absl import flags
from rich.console import Console
from rich.table import Table

import eesd_jax
from eesd_jax import cli, files
from eesd_jax.model import stored
from eesd_jax.weights.load import LoadedModel

FLAGS = flags.FLAGS
flags.DEFINE_integer("new_tokens", 128, "Tokens generated from each prompt.")
flags.DEFINE_integer("batch_size", 16, "Batch of the throughput row.")
flags.DEFINE_integer("repeats", 2, "Rounds through the prompts that are timed, after one that is not.")
flags.DEFINE_string("json", None, "File to write the result to.")

T = TypeVar("T")
AS_STORED, IN_FLOAT32 = "as stored", "in float32"
PROMPTS = (
    "Why is the sky blue?",
    "Write a short story about a lighthouse keeper.",
    "Explain how a bicycle stays upright.",
    "List the steps to bake sourdough bread.",
)


def read_bandwidth() -> float:
    """Measures the bytes per second of reading memory on all cores: the median of ten sums over 1 GiB."""
    block = torch.ones(2**28)
    seconds: list[float] = []
    for _ in range(10):
        timed(seconds, block.sum)
    return block.nbytes / statistics.median(seconds)


def stored_bytes(model: LoadedModel) -> int:
    """Counts the bytes of all weights, as codes where they have any."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(stored.read(model.params)))


def timed(seconds: list[float], work: Callable[[], T]) -> T:
    """Runs the work, adds its wall time, and returns its result."""
    start = time.perf_counter()
    result = work()
    seconds.append(time.perf_counter() - start)
    return result


def main(argv: Sequence[str]) -> None:
    del argv
    reference = torch_reference.load_model()
    # Without EOS ids, so that every text has the same length.
    loaded = eesd_jax.load("demo", dtype="float32").model._replace(eos_ids=())
    config = eesd_jax.DecodeConfig(max_new_tokens=FLAGS.new_tokens)
    engines = {AS_STORED: eesd_jax.Engine(loaded, config)}
    if stored.has_codes(loaded.params):
        engines[IN_FLOAT32] = eesd_jax.Engine(loaded._replace(params=stored.dense(loaded.params)), config)
    prompts = [engines[AS_STORED].encode(prompt) for prompt in PROMPTS]
    batch = [prompts[i % len(prompts)] for i in range(FLAGS.batch_size)]

    def run(engine: eesd_jax.Engine, prompts: list[list[int]]) -> list[list[int]]:
        return [text.token_ids for text in engine.generate_ids(prompts, seeds=[0] * len(prompts), controller=None)]

    times: dict[tuple[str, int], list[float]] = collections.defaultdict(list)
    identical = True
    for repeat in range(FLAGS.repeats + 1):
        for ids in prompts:
            found = timed(times["transformers", 1], lambda ids=ids: torch_reference.generate(reference, ids, FLAGS.new_tokens))
            for name, engine in engines.items():
                identical &= timed(times[name, 1], lambda engine=engine, ids=ids: run(engine, [ids])) == [found]
        for name, engine in engines.items():
            timed(times[name, FLAGS.batch_size], lambda engine=engine: run(engine, batch))
        if repeat == 0:  # that time compiles
            times.clear()

    speed = {(name, rows): FLAGS.new_tokens * rows * len(values) / sum(values) for (name, rows), values in times.items()}
    bandwidth = read_bandwidth()
    sizes = {name: stored_bytes(engine.model) for name, engine in engines.items()}
    base = speed["transformers", 1]
    table = Table(title=f"SmolLM2-135M-Instruct, float32, greedy, {FLAGS.new_tokens} new tokens, {len(PROMPTS)} prompts in turn")
    for column in ("", "tokens/s", "ratio"):
        table.add_column(column, justify="right" if column else "left")
    table.add_row("transformers + torch generate, batch 1", f"{base:.1f}", "1.00")
    result = {
        "new_tokens": FLAGS.new_tokens,
        "transformers_tokens_per_second": base,
        "batch_size": FLAGS.batch_size,
        "read_bandwidth_gb_per_second": bandwidth / 1e9,
        "identical_tokens": identical,
    }
    for name in engines:
        one, many, bound = speed[name, 1], speed[name, FLAGS.batch_size], bandwidth / sizes[name]
        table.add_section()
        table.add_row(f"eesd_jax plain, weights {name}, batch 1", f"{one:.1f}", f"{one / base:.2f}")
        title = f"memory bound: {sizes[name] / 1e6:.0f} MB at {bandwidth / 1e9:.0f} GB/s"
        table.add_row(title, f"{bound:.1f}", f"{bound / base:.2f}")
        table.add_row(f"eesd_jax plain, weights {name}, batch {FLAGS.batch_size}", f"{many:.1f}", f"{many / one:.2f} x its batch 1")
        result[name] = {
            "tokens_per_second": one,
            "ratio": one / base,
            "memory_bound_tokens_per_second": bound,
            "batch_tokens_per_second": many,
            "batch_ratio": many / one,
        }
    Console().print(table)
    print(f"identical tokens: {'yes' if identical else 'no'}")
    if FLAGS.json:
        with files.whole_file(FLAGS.json) as file:
            json.dump(result, file, indent=2)


if __name__ == "__main__":
    cli.run(main)
