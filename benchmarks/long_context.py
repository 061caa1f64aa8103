"""Times a step of plain decoding with little text in a long cache, and with the same text in a short one.

    python benchmarks/long_context.py
    python benchmarks/long_context.py --nokernels
    python benchmarks/long_context.py --model=FILE.gguf --dtype=bfloat16 --capacities=1024,8192,32768

Masks hide what is not valid, so results never depend on the empty room in a cache; time should not either. In float32 on a CPU attention
is a kernel that reads only the valid part. Elsewhere it is XLA's, over the least of a few sizes that holds the longest row.
"""

import statistics
import time
from collections.abc import Sequence

from absl import flags

from eesd_jax import cli
from eesd_jax.errors import UserError

FLAGS = flags.FLAGS
flags.DEFINE_string("model", "demo", "As for infer/generate.py.")
flags.DEFINE_list("dtype", ["float32"], "Of weights and arithmetic; all of these are measured.")
flags.DEFINE_bool("kernels", True, "On a CPU this project's own; without them attention is XLA's, as on accelerators.")
flags.DEFINE_list("capacities", ["1024", "2048", "8192"], "Slots of the caches.")
flags.DEFINE_integer("length", 512, "Tokens of the text.")
flags.DEFINE_integer("steps", 16, "Timed together.")
flags.DEFINE_integer("repeats", 7, "Of which the median counts; capacities take turns.")


def main(argv: Sequence[str]) -> None:
    del argv
    capacities = [int(capacity) if capacity.isdecimal() else 0 for capacity in FLAGS.capacities]
    if not capacities or min(capacities) < FLAGS.length + FLAGS.steps + 2:
        needed = FLAGS.length + FLAGS.steps + 2
        raise UserError(f"--capacities is {','.join(FLAGS.capacities)!r}; expected integers >= {needed}, the text and the steps")
    rows = []
    for dtype in FLAGS.dtype:
        from eesd_jax.model import ops

        with ops.kernels_for("" if FLAGS.kernels else ops.PLAIN):
            seconds = measure(dtype, capacities)
        first = seconds[capacities[0]]
        rows += [(dtype, str(capacity), f"{1e3 * seconds[capacity]:.2f}", f"{seconds[capacity] / first:.3f}") for capacity in capacities]

    from eesd_jax.bench.report import table

    print(table(("dtype", "slots of the cache", f"a step behind {FLAGS.length} tokens, ms", "to the first"), rows))


def measure(dtype: str, capacities: list[int]) -> dict[int, float]:
    """Times a step: seconds by capacity."""
    import jax

    import eesd_jax
    from eesd_jax.config import SamplingConfig
    from eesd_jax.engine.engine import Engine

    model = eesd_jax.load(FLAGS.model, dtype=dtype, exit_branch="none", arms=["exit"]).model
    context = model.config.context_length
    if max(capacities) > context:
        raise UserError(f"--capacities is {','.join(FLAGS.capacities)!r}; expected at most {context}, the model's context")
    lm = Engine(model._replace(eos_ids=()))
    prompt = [i % model.config.vocab_size for i in range(1, FLAGS.length + 1)]
    times: dict[int, list[float]] = {capacity: [] for capacity in capacities}
    for repeat in range(FLAGS.repeats + 1):
        for capacity in capacities:
            state = lm.prefill([prompt], [0], 1, capacity - FLAGS.length)
            if state.tokens.shape[1] != capacity:
                raise UserError(f"--capacities has {capacity}, and caches have {state.tokens.shape[1]} slots then; expected one of those")
            state = jax.block_until_ready(lm.decode(state, SamplingConfig(), None, 1))
            start = time.perf_counter()
            jax.block_until_ready(lm.decode(state, SamplingConfig(), None, FLAGS.steps))
            if repeat > 0:  # the first time compiles
                times[capacity].append((time.perf_counter() - start) / FLAGS.steps)
    return {capacity: statistics.median(values) for capacity, values in times.items()}


if __name__ == "__main__":
    cli.run(main)
