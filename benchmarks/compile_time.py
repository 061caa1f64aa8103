"""Times how long the decoder's programs take to compile for the built-in model, with nothing taken from a cache on disk.

    python benchmarks/compile_time.py
    python benchmarks/compile_time.py --batch_size=8 --controllers=beta,cost_aware --output=compile.json

JAX itself measures tracing, lowering and XLA's compilation; a user waits for all three, once for each batch and bucket.
"""

import contextlib
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from absl import flags
from stand_in import untrained_drafter

import eesd_jax
from eesd_jax import cli, files
from eesd_jax.bench import report
from eesd_jax.config import LONGEST_MATCH
from eesd_jax.engine.engine import Engine
from eesd_jax.engine.timing import PROMPT_TOKENS

FLAGS = flags.FLAGS
flags.DEFINE_list("controllers", ["plain", "beta", "cost_aware"], "Controllers whose programs are compiled.")
flags.DEFINE_bool("lookup", True, "Whether drafts also come from lookup.")
flags.DEFINE_integer("batch_size", 1, "Rows that are decoded together.")
flags.DEFINE_integer("max_draft", 8, "The most tokens that a round may draft.")
flags.DEFINE_string("output", None, "File to write the result to (JSON).")

STAGES = {"jaxpr_trace_duration": "trace", "jaxpr_to_mlir_module_duration": "lower", "backend_compile_duration": "compile"}
PROGRAMS = ("prefill", "_decode_plain", "_decode_speculative")


@contextlib.contextmanager
def stopwatch() -> Iterator[dict[str, dict[str, float]]]:
    """Measures the seconds of each stage of the programs that are compiled in this context, by program."""
    seconds: dict[str, dict[str, float]] = {}

    def listen(event: str, duration: float, *, fun_name: str = "", **details: Any) -> None:
        del details
        stage, name = STAGES.get(event.rpartition("/")[2]), re.sub(r"^jit\((.*)\)$", r"\1", fun_name)
        if stage and name in PROGRAMS:
            stages = seconds.setdefault(name, dict.fromkeys(STAGES.values(), 0.0))
            stages[stage] += duration

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seconds
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def main(argv: Sequence[str]) -> None:
    del argv
    loaded = eesd_jax.load("demo", dtype="float32", exit_branch="none")
    drafter = untrained_drafter(loaded.model, FLAGS.max_draft, LONGEST_MATCH if FLAGS.lookup else 0)
    engine = Engine(loaded.model, loaded.decode_config, drafter)
    controllers = {name: engine.controller(name, batch=FLAGS.batch_size) for name in FLAGS.controllers}
    jax.config.update("jax_enable_compilation_cache", False)
    prompts = [list(range(1, PROMPT_TOKENS + 1))] * FLAGS.batch_size
    rows = []
    for name, controller in controllers.items():
        jax.clear_caches()
        with stopwatch() as seconds:
            engine.generate_ids(
                prompts, seeds=[0] * FLAGS.batch_size, max_new_tokens=engine.decode_config.max_new_tokens, controller=controller
            )
        rows += [{"controller": name, "program": program} | stages for program, stages in seconds.items()]
    lines = []
    for row in rows:
        stages = [row[stage] for stage in STAGES.values()]
        what = f"{row['program'].strip('_')} ({row['controller']})"
        lines.append((what, *(f"{value:.1f}" for value in (*stages, sum(stages)))))
    print(report.table(("program", "trace, s", "lower, s", "compile, s", "all, s"), lines))
    if FLAGS.output:
        with files.whole_file(FLAGS.output) as file:
            json.dump({"batch_size": FLAGS.batch_size, "lookup": FLAGS.lookup, "programs": rows}, file, indent=2)


if __name__ == "__main__":
    cli.run(main)
