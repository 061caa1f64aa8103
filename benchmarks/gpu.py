"""Measures how close to its limits an accelerator decodes and trains, with a model of random weights and nothing to fetch.

    python benchmarks/gpu.py --json=gpu.json
    python benchmarks/gpu.py --model=demo --prompt="Why is the sky blue?"
    python benchmarks/gpu.py --shape=tiny --batch_sizes=1,2 --rows=2 --sequence_length=64     # anywhere, in a minute
    python benchmarks/gpu.py --count="NVIDIA H200"     # anywhere, at once: nothing is run

Measured are: plain decoding, against the time to read all weights once at the bandwidth that copying reaches in the same run; rounds by
the number of drafts, with one candidate for each and with several, in plain steps; a step of distillation, as a share of the data sheet's
peak (of a measured product of matrices where there is no data sheet); a real model end to end, if --model is given; transformers + PyTorch
`generate` on the same shape, where torch sees a GPU. --count says what each part of a round reads and computes, and how long that takes a
chip at least, by its data sheet; measured times are compared with the same bounds, at the bandwidth that the run measured.
"""

import dataclasses
import gc
import json
import math
import time
import zlib
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from rates import copy_bandwidth, matrix_rate, median_seconds
from stand_in import DRAFT_VOCAB, untrained_drafter
from work import Work, least_round, work_of_parts

import eesd_jax
from eesd_jax import cli, files
from eesd_jax.bench import report
from eesd_jax.cluster.hardware import cpu_name, find_chip
from eesd_jax.config import LONGEST_MATCH, DecodeConfig, DraftConfig, LossConfig, OptimizerConfig, SamplingConfig
from eesd_jax.distill import step, teacher
from eesd_jax.distill.data import Batch
from eesd_jax.engine import timing
from eesd_jax.engine.engine import Engine
from eesd_jax.errors import UserError
from eesd_jax.model import exit_branch, llama, sharding
from eesd_jax.model.config import ModelConfig
from eesd_jax.weights import known, tiny
from eesd_jax.weights.load import LoadedModel

FLAGS = flags.FLAGS
flags.DEFINE_string("shape", "meta-llama/Llama-2-13b-chat-hf", "Whose shape: a model of configs/, tiny, or a Hugging Face folder.")
flags.DEFINE_string("dtype", "bfloat16", "float32 or bfloat16.")
flags.DEFINE_list("batch_sizes", ["1", "8"], "Rows that are decoded together.")
flags.DEFINE_integer("max_draft", 8, "The most tokens that a round drafts.")
flags.DEFINE_integer("candidates", 2, "Candidates for each of them in the rounds that are measured with several.")
flags.DEFINE_integer("rows", 4, "Rows of a training step; 0: none is made.")
flags.DEFINE_integer("sequence_length", 1024, "Tokens of such a row.")
flags.DEFINE_string("model", None, "A real model to answer --prompt, as for infer/generate.py; default: none.")
flags.DEFINE_string("prompt", "Why is the sky blue?", "What it is asked.")
flags.DEFINE_string("count", None, "A chip, by its name; nothing is run, and the least time of each part on it is counted.")
flags.DEFINE_string("json", None, "File to write the result to.")

STEPS, REPEATS = 16, 5
PROMPT_TOKENS, NEW_TOKENS = 32, 128


def random_params(config: ModelConfig, dtype: jnp.dtype) -> llama.Params:
    """Draws weights on the device, one after the other."""

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if len(leaf.shape) == 1:
            return jnp.ones(leaf.shape, dtype)
        key = jax.random.key(zlib.crc32(jax.tree_util.keystr(path).encode()))
        return normal(key, leaf.shape, leaf.shape[1] ** -0.5)

    normal = jax.jit(lambda key, shape, scale: (scale * jax.random.normal(key, shape, dtype)).astype(dtype), static_argnums=1)
    shapes = nn.meta.unbox(sharding.abstract_params(config))
    return jax.tree_util.tree_map_with_path(draw, shapes)


def make_engine(config: ModelConfig, dtype: jnp.dtype) -> Engine:
    """Makes an engine of random weights, whose texts do not end; an eighth of its blocks drafts, with a branch that was never trained."""
    params = random_params(config, dtype)
    model = LoadedModel(config, params, tiny.tokenizer(), ())
    drafter = untrained_drafter(model, FLAGS.max_draft, LONGEST_MATCH, exit_layer=max(1, config.num_layers // 8))
    return Engine(model, DecodeConfig(max_new_tokens=NEW_TOKENS), drafter)


def measure_decoding(engine: Engine, batch: int, bandwidth: float) -> dict[str, Any]:
    """Times a plain step and rounds; returns each with the time that reading the weights alone would take."""
    prompts = [[i % engine.model.config.vocab_size for i in range(1, PROMPT_TOKENS + 1)]] * batch
    state = engine.prefill(prompts, [0] * batch, batch, (REPEATS + 1) * STEPS + 1, None)

    def steps() -> Any:
        nonlocal state
        state = engine.decode(state, SamplingConfig(), None, STEPS)
        return state

    plain = median_seconds(steps, REPEATS) / STEPS
    costs = timing.measure(engine, batch)
    drafter = engine.drafter
    several = drafter._replace(draft=dataclasses.replace(drafter.draft, candidates=FLAGS.candidates, longest_match=0))
    costs_of_several = timing.measure(Engine(engine.model, engine.decode_config, several), batch)
    works = work_of_parts(engine.model.config, drafter.draft, engine.params, engine.branch, batch, PROMPT_TOKENS)
    bounds = [least_round(works, drafter.draft, drafts, bandwidth) for drafts in range(FLAGS.max_draft + 1)]
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(engine.params))
    if not engine.model.config.tie_embeddings:
        weights -= engine.params["embed"].nbytes  # of which a step reads a few rows
    bound = weights / bandwidth
    return {
        "batch_size": batch,
        "plain_ms": 1e3 * plain,
        "bound_ms": 1e3 * bound,
        "tokens_per_second": batch / plain,
        "share_of_bound": bound / plain,
        "round_bounds_ms": [1e3 * seconds for seconds in bounds],
        "rounds_ms": [1e3 * seconds for seconds in costs.exit],
        "looked_up_rounds_ms": [1e3 * seconds for seconds in costs.look_up],
        "rounds_with_candidates_ms": [1e3 * seconds for seconds in costs_of_several.exit],
    }


def measure_training(engine: Engine, dtype: jnp.dtype) -> dict[str, Any]:
    """Times a step of online distillation; the engine's blocks are used up."""
    config = engine.model.config
    branch = jax.tree.map(jnp.copy, engine.drafter.branch)
    trunk = teacher.split_trunk(config, engine.model.params, engine.drafter.draft.exit_layer)
    options = step.StepConfig(config, LossConfig(chunk=128), OptimizerConfig(), 1000, online=True)
    state = step.init_state(options, branch, train_head=False)
    frozen = step.Frozen(trunk, branch.head, branch.draft_ids)
    shape = (FLAGS.rows, FLAGS.sequence_length)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, shape, np.int32)
    ones, places = np.ones(shape, np.int32), np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    batch = jax.device_put(Batch(tokens, ones, places, places > 0, np.arange(shape[0], dtype=np.int32)))
    run = step.jit_step(state)

    def train() -> Any:
        nonlocal state
        state, metrics = run(options, frozen, state, batch, None)
        return metrics

    seconds = median_seconds(train, REPEATS)
    flops = step.position_flops(config, branch.draft_ids.size, online=True, train_head=False) * math.prod(shape)
    chip = find_chip(jax.devices()[0].device_kind)
    peak = chip.flops if chip else matrix_rate(dtype)
    return {
        "rows": shape[0],
        "sequence_length": shape[1],
        "step_ms": 1e3 * seconds,
        "tokens_per_second": math.prod(shape) / seconds,
        "tflops_per_second": flops / seconds / 1e12,
        "peak_tflops_per_second": peak / 1e12,
        "peak_from": "data sheet" if chip else "a product of matrices",
        "share_of_peak": flops / seconds / peak,
    }


def measure_model() -> dict[str, Any]:
    """Times plain decoding and the default controller on a real model; each answers once before it is timed."""
    engine = eesd_jax.load(FLAGS.model, dtype=FLAGS.dtype)
    found = {}
    for name in ("plain", "auto"):
        for _ in range(2):
            found[name] = engine.generate(FLAGS.prompt, controller=name, max_new_tokens=NEW_TOKENS)
    plain, ours = found["plain"], found["auto"]
    return {
        "model": FLAGS.model,
        "plain_tokens_per_second": plain.tokens_per_second,
        "tokens_per_second": ours.tokens_per_second,
        "speedup": ours.tokens_per_second / plain.tokens_per_second,
        "tokens_per_round": ours.tokens_per_round,
        "identical": ours.token_ids == plain.token_ids,
    }


def measure_transformers() -> dict[str, Any] | None:
    """Times `generate` of transformers on random weights of the same shape; None where torch sees no GPU or does not know the shape."""
    try:
        import torch
        import transformers
    except ImportError:
        return None
    if not torch.cuda.is_available() or FLAGS.shape not in known.CONFIGS:
        return None
    with torch.device("cuda"):
        config = transformers.AutoConfig.for_model(**known.CONFIGS[FLAGS.shape])
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, FLAGS.dtype)).eval()
        ids = torch.arange(1, PROMPT_TOKENS + 1)[None]
    seconds = []
    for _ in range(3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.no_grad():
            model.generate(ids, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return {"tokens_per_second": NEW_TOKENS / min(seconds[1:])}


def count_work(config: ModelConfig, dtype: jnp.dtype, batch: int) -> tuple[DraftConfig, dict[Any, Work]]:
    """Counts the work of every part of a round of such a model, without allocating it; N and the draft vocabulary as in `make_engine`."""
    draft = DraftConfig(max(1, config.num_layers // 8), FLAGS.max_draft)

    def of_dtype(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), tree)

    params = of_dtype(nn.meta.unbox(sharding.abstract_params(config)))
    branch = of_dtype(exit_branch.abstract_exit_branch(config, min(DRAFT_VOCAB, config.vocab_size)))
    return draft, work_of_parts(config, draft, params, branch, batch, PROMPT_TOKENS)


def count(config: ModelConfig, dtype: jnp.dtype, batches: Sequence[int]) -> dict[str, Any]:
    """Prints the work of the parts of a round, and the least time that a chip needs for them."""
    chip = find_chip(FLAGS.count)
    if chip is None:
        raise UserError(f"--count is {FLAGS.count!r}; expected a chip whose data sheet is known, as 'NVIDIA H200' or 'TPU v5p'")
    header = ("part", "batch", "GB", "GFLOP", "ms at least, memory", "ms at least, arithmetic")
    lines, found = [], []
    for batch in batches:
        draft, works = count_work(config, dtype, batch)
        for name, work in works.items():
            label = {"early": f"blocks 1..{draft.exit_layer}, one token", "exit": "exit block, head"}.get(name) or f"verify {name[1]}"
            times = (f"{1e3 * work.bytes / chip.bandwidth:.3f}", f"{1e3 * work.flops / chip.flops:.3f}")
            lines.append((label, str(batch), f"{work.bytes / 1e9:.3f}", f"{work.flops / 1e9:.1f}", *times))
        rounds = [1e3 * least_round(works, draft, drafts, chip.bandwidth, chip.flops) for drafts in range(FLAGS.max_draft + 1)]
        parts = {label: work._asdict() for (label, *_), work in zip(lines[-len(works) :], works.values(), strict=True)}
        found.append({"batch_size": batch, "parts": parts, "round_bounds_ms": rounds})
    print(report.table(header, lines))
    rows = [(f"batch {one['batch_size']}", *(f"{bound:.2f}" for bound in one["round_bounds_ms"])) for one in found]
    print("\n" + report.table(("a round at least, ms, by drafts", *map(str, range(FLAGS.max_draft + 1))), rows))
    return {"shape": FLAGS.shape, "dtype": FLAGS.dtype, "chip": FLAGS.count, "counted": found}


def show(result: dict[str, Any]) -> None:
    """Prints the tables of a result."""
    rows = []
    for one in result["decoding"]:
        what = (str(one["batch_size"]), f"{one['plain_ms']:.2f}", f"{one['bound_ms']:.2f}", f"{one['share_of_bound']:.2f}")
        rows.append((*what, f"{one['tokens_per_second']:.1f}"))
    print(report.table(("batch", "plain step, ms", "bound, ms", "share of bound", "tokens/s"), rows))
    counts = range(FLAGS.max_draft + 1)
    sources = {
        "the least that memory allows": "round_bounds_ms",
        "exit branch": "rounds_ms",
        f"exit branch, {FLAGS.candidates} candidates": "rounds_with_candidates_ms",
        "lookup": "looked_up_rounds_ms",
    }
    lines = []
    for one in result["decoding"]:
        for source, field in sources.items():
            lines.append((f"{source}, batch {one['batch_size']}", *(f"{value / one['plain_ms']:.2f}" for value in one[field])))
    print("\n" + report.table(("a round, in plain steps, by drafts", *map(str, counts)), lines))
    if training := result["training"]:
        print(
            f"\ntraining step: {training['step_ms']:.1f} ms, {training['tokens_per_second']:,.0f} tokens/s, "
            f"{training['share_of_peak']:.2f} of {training['peak_tflops_per_second']:.3g} TFLOP/s ({training['peak_from']})"
        )
    if model := result["model"]:
        print(
            f"\n{model['model']}: plain {model['plain_tokens_per_second']:.1f} tokens/s, default {model['tokens_per_second']:.1f}, "
            f"ratio {model['speedup']:.2f}, identical: {'yes' if model['identical'] else 'no'}"
        )
    if peer := result["transformers"]:
        print(f"\ntransformers generate, batch 1: {peer['tokens_per_second']:.1f} tokens/s")


def write(result: dict[str, Any]) -> None:
    """Writes the result to --json, if it is given."""
    if FLAGS.json:
        with files.whole_file(FLAGS.json) as file:
            json.dump(result, file, indent=2)


def main(argv: Sequence[str]) -> None:
    del argv
    batches = [int(size) for size in FLAGS.batch_sizes if size.isdecimal() and int(size) > 0]
    if len(batches) != len(FLAGS.batch_sizes) or not batches:
        raise UserError(f"--batch_sizes is {','.join(FLAGS.batch_sizes)!r}; expected positive integers")
    if FLAGS.dtype not in ("float32", "bfloat16"):
        raise UserError(f"--dtype is {FLAGS.dtype!r}; expected float32 or bfloat16")
    for name, least in (("max_draft", 1), ("candidates", 1), ("rows", 0), ("sequence_length", 2)):
        if FLAGS[name].value < least:
            raise UserError(f"--{name} is {FLAGS[name].value}; expected an integer >= {least}")
    dtype, config = jnp.dtype(FLAGS.dtype), known.find_config(FLAGS.shape)
    if FLAGS.count is not None:
        write(count(config, dtype, batches))
        return
    bandwidth = copy_bandwidth()
    device = jax.devices()[0].device_kind
    print(f"{FLAGS.shape}, {FLAGS.dtype}, on {device} ({cpu_name()}); copies move {bandwidth / 1e9:,.0f} GB/s\n", flush=True)
    engine = make_engine(config, dtype)
    result = {"shape": FLAGS.shape, "dtype": FLAGS.dtype, "device": device, "jax": jax.__version__, "copy_bandwidth": bandwidth}
    result["decoding"] = [measure_decoding(engine, batch, bandwidth) for batch in batches]
    result["training"] = measure_training(engine, dtype) if FLAGS.rows else None
    del engine
    gc.collect()
    result["model"] = measure_model() if FLAGS.model else None
    result["transformers"] = measure_transformers()
    show(result)
    write(result)


if __name__ == "__main__":
    cli.run(main)
