"""What the commands share: flags, one clear line for a user's mistake (exit code 2), files that appear only when whole."""

import contextlib
import os
import pathlib
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn, TextIO

from absl import app, flags, logging

from eesd_jax.config import DecodeConfig, SamplingConfig
from eesd_jax.engine import Engine, load
from eesd_jax.errors import UserError

FLAGS = flags.FLAGS
CONTROLLERS = ("plain",)


def define_model_flags() -> None:
    """--model and --dtype."""
    flags.DEFINE_string("model", "demo", "demo (built in), a Hugging Face folder, a GGUF file, or a hub id.")
    flags.DEFINE_string("dtype", None, "float32 or bfloat16; default: float32 on CPU, bfloat16 elsewhere.")


def define_generation_flags() -> None:
    """Everything that says what to generate and how."""
    sampling, decode = SamplingConfig(), DecodeConfig()
    flags.DEFINE_string(
        "prompts",
        None,
        'File of prompts, one JSON object a line: {"turns": [...]}, {"prompt": ...} or {"messages": [...]}.',
    )
    flags.DEFINE_string("controller", "plain", f"How many tokens to draft: {', '.join(CONTROLLERS)} (plain: no speculation).")
    flags.DEFINE_integer("max_new_tokens", decode.max_new_tokens, "Budget of each answer, in tokens.")
    flags.DEFINE_float("temperature", sampling.temperature, "0 is greedy.")
    flags.DEFINE_integer("top_k", sampling.top_k, "Keep the k most probable tokens; 0: all.")
    flags.DEFINE_float("top_p", sampling.top_p, "Keep the most probable tokens that together reach this probability; 1: all.")
    flags.DEFINE_float("min_p", sampling.min_p, "Keep tokens at least this times as probable as the most probable one; 0: all.")
    flags.DEFINE_integer("seed", decode.seed, "Line i of a prompt file draws with seed + i.")
    flags.DEFINE_integer("batch_size", decode.batch_size, "Prompts generated at once.")
    flags.DEFINE_bool("chat", None, "Use the model's chat template; default: if it has one.")
    flags.DEFINE_multi_string("stop", [], "Text that ends an answer; may be repeated.")


def sampling_from_flags() -> SamplingConfig:
    """Raises UserError for values out of range."""
    return SamplingConfig(FLAGS.temperature, FLAGS.top_k, FLAGS.top_p, FLAGS.min_p)


def check_generation_flags() -> None:
    """Finds what is wrong with the flags before anything slow is started."""
    for name in ("max_new_tokens", "batch_size"):
        if FLAGS[name].value < 1:
            raise UserError(f"--{name} is {FLAGS[name].value}; expected an integer >= 1")
    if FLAGS.controller not in CONTROLLERS:
        raise UserError(f"--controller is {FLAGS.controller!r}; expected one of {', '.join(CONTROLLERS)}")
    sampling_from_flags()


def load_from_flags() -> Engine:
    """The engine that the flags ask for."""
    return load(
        FLAGS.model,
        dtype=FLAGS.dtype,
        decode_config=DecodeConfig(max_new_tokens=FLAGS.max_new_tokens, batch_size=FLAGS.batch_size, seed=FLAGS.seed),
    )


@contextlib.contextmanager
def whole_file(path: str | pathlib.Path) -> Iterator[TextIO]:
    """Opens a text file that appears under its name only when it is complete; raises UserError where it cannot be written."""
    path = pathlib.Path(path).expanduser()
    try:
        handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise UserError(f"cannot write {str(path)!r} ({error.strerror})") from None
    try:
        with open(handle, "w", encoding="utf-8") as file:
            yield file
        os.chmod(partial, 0o666 & ~_umask())  # mkstemp makes files that only their owner can read
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def run(main: Callable[[Sequence[str]], None]) -> NoReturn:
    """Runs a command: parses flags, and turns a user's mistake into one line on stderr and exit code 2."""

    def parse(argv: Sequence[str]) -> Sequence[str]:
        try:
            rest = FLAGS(argv)
        except flags.Error as error:
            _fail(str(error).splitlines()[0])
        if len(rest) > 1:
            _fail(f"unexpected argument {rest[1]!r}; expected --flag=value")
        if not FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # absl shows what JAX logs about every backend that it looked for
        return rest

    def guarded(argv: Sequence[str]) -> None:
        try:
            main(argv)
        except UserError as error:
            _fail(str(error))
        except KeyboardInterrupt:
            sys.exit(130)

    app.run(guarded, flags_parser=parse)


def _fail(message: str) -> NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)
