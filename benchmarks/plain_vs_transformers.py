"""Plain decoding against transformers + PyTorch `generate`: same weights, same prompts, same run, float32, greedy.

    pip install -e ".[parity]"
    python benchmarks/plain_vs_transformers.py

The two take turns prompt by prompt, so that a drift of the machine's speed cancels. The memory bound is the time to read the weights once a
token at the bandwidth measured in the same run. Batch 16 is compared with this project's own batch 1.
"""

import json
import statistics
import time
from collections.abc import Callable, Sequence

import jax
import torch
import torch_reference
from absl import flags
from rich.console import Console
from rich.table import Table

import eesd_jax
from eesd_jax import cli

FLAGS = flags.FLAGS
flags.DEFINE_integer("new_tokens", 128, "Tokens generated from each prompt.")
flags.DEFINE_integer("batch_size", 16, "Batch of the throughput row.")
flags.DEFINE_integer("repeats", 2, "Rounds through the prompts that are timed, after one that is not.")
flags.DEFINE_string("json", None, "File to write the result to.")

PROMPTS = (
    "Why is the sky blue?",
    "Write a short story about a lighthouse keeper.",
    "Explain how a bicycle stays upright.",
    "List the steps to bake sourdough bread.",
)


def read_bandwidth() -> float:
    """Bytes per second of reading memory on all cores: the median of ten sums over 1 GiB."""
    block = torch.ones(2**28)
    return block.nbytes / statistics.median(seconds(block.sum) for _ in range(10))


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main(argv: Sequence[str]) -> None:
    del argv
    reference = torch_reference.load_model()
    # Without EOS ids, so that every text has the same length.
    loaded = eesd_jax.load("demo", dtype="float32").model._replace(eos_ids=())
    engine = eesd_jax.Engine(loaded, eesd_jax.DecodeConfig(max_new_tokens=FLAGS.new_tokens))
    prompts = [engine.encode(prompt) for prompt in PROMPTS]

    def run_transformers(ids: list[int]) -> list[int]:
        return torch_reference.generate(reference, ids, FLAGS.new_tokens)

    def run_batch(prompts: list[list[int]]) -> list[list[int]]:
        return [generation.token_ids for generation in engine.generate_ids(prompts, seeds=[0] * len(prompts))]

    batch = [prompts[i % len(prompts)] for i in range(FLAGS.batch_size)]
    times: dict[str, list[float]] = {"transformers": [], "eesd_jax": [], "eesd_jax batch": []}
    identical = True
    for repeat in range(FLAGS.repeats + 1):
        for ids in prompts:
            theirs = seconds(lambda ids=ids: run_transformers(ids))
            ours = seconds(lambda ids=ids: run_batch([ids]))
            if repeat == 0:
                identical &= run_transformers(ids) == run_batch([ids])[0]
            else:
                times["transformers"].append(theirs)
                times["eesd_jax"].append(ours)
        batched = seconds(lambda: run_batch(batch))
        if repeat > 0:
            times["eesd_jax batch"].append(batched)

    tokens = {"transformers": FLAGS.new_tokens, "eesd_jax": FLAGS.new_tokens, "eesd_jax batch": FLAGS.new_tokens * FLAGS.batch_size}
    speed = {name: tokens[name] * len(values) / sum(values) for name, values in times.items()}
    bandwidth = read_bandwidth()
    weight_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(loaded.params))
    result = {
        "new_tokens": FLAGS.new_tokens,
        "transformers_tokens_per_second": speed["transformers"],
        "tokens_per_second": speed["eesd_jax"],
        "ratio": speed["eesd_jax"] / speed["transformers"],
        "batch_size": FLAGS.batch_size,
        "batch_tokens_per_second": speed["eesd_jax batch"],
        "batch_ratio": speed["eesd_jax batch"] / speed["eesd_jax"],
        "read_bandwidth_gb_per_second": bandwidth / 1e9,
        "memory_bound_tokens_per_second": bandwidth / weight_bytes,
        "identical_tokens": identical,
    }
    table = Table(title=f"SmolLM2-135M-Instruct, float32, greedy, {FLAGS.new_tokens} new tokens, {len(PROMPTS)} prompts in turn")
    for column in ("", "tokens/s", "ratio"):
        table.add_column(column, justify="right" if column else "left")
    table.add_row("transformers + torch generate, batch 1", f"{speed['transformers']:.1f}", "1.00")
    table.add_row("eesd_jax plain, batch 1", f"{speed['eesd_jax']:.1f}", f"{result['ratio']:.2f}")
    bound = result["memory_bound_tokens_per_second"]
    table.add_row(f"memory bound, batch 1 ({bandwidth / 1e9:.0f} GB/s)", f"{bound:.1f}", f"{bound / speed['transformers']:.2f}")
    table.add_row(
        f"eesd_jax plain, batch {FLAGS.batch_size}", f"{speed['eesd_jax batch']:.1f}", f"{result['batch_ratio']:.2f} x its batch 1"
    )
    Console().print(table)
    print(f"identical tokens: {'yes' if identical else 'no'}")
    if FLAGS.json:
        with cli.whole_file(FLAGS.json) as file:
            json.dump(result, file, indent=2)


if __name__ == "__main__":
    cli.run(main)
