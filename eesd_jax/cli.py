"""What the commands share: flags, and one clear line for a user's mistake (exit code 2), whatever the standard streams are."""

import contextlib
import dataclasses
import errno
import logging
import math
import os
import re
import shutil
import sys
import textwrap
import traceback
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from absl import app, flags
from absl import logging as absl_logging

from eesd_jax.config import (
    ARMS,
    DEFAULT_CONTROLLER,
    NOT_QUANTIZED,
    QUANTIZATIONS,
    DecodeConfig,
    DraftConfig,
    MeshConfig,
    ProcessesConfig,
    SamplingConfig,
    check_quantize,
    parse_arms,
)
from eesd_jax.decode.controllers import AUTO, PLAIN, known_names, parse_controller
from eesd_jax.errors import UserError
from eesd_jax.weights import hub

if TYPE_CHECKING:  # JAX and transformers take seconds, so they are imported where they are needed, after the flags are checked
    from jax.sharding import Mesh

    from eesd_jax.decode.controllers import Controller
    from eesd_jax.engine.engine import Engine

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it would say that it misses PyTorch, which nothing here needs

UNTRAINED = "The exit branch is untrained: no speed-up is to be expected of it."
# Which extra of pyproject.toml brings a library that not every command needs, by the name that is imported.
_EXTRAS = {"matplotlib": "bench"} | dict.fromkeys(
    ("array_record", "grain", "optax", "orbax", "tensorboardX", "tensorflow_datasets"), "train"
)
FLAGS = flags.FLAGS
flags.disclaim_key_flags()  # flags defined here belong to the command that asked for them, and show in its --help


def define_model_flags() -> None:
    """--model, --dtype, --quantize, --mesh, and what drafts."""
    flags.DEFINE_string("model", hub.DEMO_NAME, "demo (built in), a Hugging Face folder, a GGUF file, or a hub id.")
    flags.DEFINE_string("dtype", None, "float32 or bfloat16; default: float32 on CPU, bfloat16 elsewhere.")
    flags.DEFINE_string(
        "quantize",
        NOT_QUANTIZED,
        f"Bits of the model's matrices: {', '.join(QUANTIZATIONS)} (as they are); answers are then those of the quantised model.",
    )
    flags.DEFINE_string(
        "exit_branch",
        "auto",
        "The branch that drafts: a folder, a hub id, demo (that of the built-in model), none, or auto: the one that comes with the model, "
        "if there is one and lookup is faster with it.",
    )
    flags.DEFINE_list(
        "mesh",
        [],
        "Devices to spread the model over: tensor:N (heads, mlp and vocabulary), fsdp:N (the other axis of the weights), data:N (rows), or "
        "several of them, as in data:2,tensor:4; default: one device.",
    )
    flags.DEFINE_list("arms", list(ARMS), "What drafts: exit (the branch), lookup (in the text so far, which needs no branch), or both.")
    flags.DEFINE_string(
        "ngrams",
        "auto",
        "A table of what the model wrote before, from which lookup drafts where the text has nothing: a file of train/ngrams.py, none, or "
        "auto: the one that comes with the model, if there is one.",
    )
    flags.DEFINE_integer("max_draft", DraftConfig.max_draft, "The most tokens to draft in a round.")
    flags.DEFINE_integer(
        "candidates",
        DraftConfig.candidates,
        "Tokens that the branch offers for each place of a draft: it drafts on from the first, and the others are checked in the same "
        "pass, in case that it is rejected. More than one may pay where a pass over more tokens costs little more, as on a GPU.",
    )


def define_generation_flags() -> None:
    """Everything that says what to generate and how."""
    sampling, decode = SamplingConfig(), DecodeConfig()
    flags.DEFINE_string(
        "prompts",
        None,
        'File of prompts, one JSON object a line: {"turns": [...]}, {"prompt": ...} or {"messages": [...]}.',
    )
    flags.DEFINE_string(
        "controller",
        None,
        f"How many tokens to draft: {known_names()} (plain: no speculation; FILE.py:CLASS: your own, see docs/controllers.md); "
        f"default: {DEFAULT_CONTROLLER} where something drafts, else plain.",
    )
    flags.DEFINE_integer("max_new_tokens", decode.max_new_tokens, "Budget of each answer, in tokens.")
    flags.DEFINE_float("temperature", sampling.temperature, "Randomness of the draw; 0 is greedy.")
    flags.DEFINE_integer("top_k", sampling.top_k, "Keep the k most probable tokens; 0: all.")
    flags.DEFINE_float("top_p", sampling.top_p, "Keep the most probable tokens that together reach this probability; 1: all.")
    flags.DEFINE_float("min_p", sampling.min_p, "Keep tokens at least this times as probable as the most probable one; 0: all.")
    flags.DEFINE_integer("seed", decode.seed, "Record i of a prompt file (from 0) draws with seed + i.")
    flags.DEFINE_integer("batch_size", decode.batch_size, "Prompts generated at once.")
    flags.DEFINE_bool("chat", None, "Use the model's chat template; default: if it has one.")
    flags.DEFINE_multi_string("stop", [], "Text that ends an answer, taken as it is; may be repeated.")


def define_distributed_flags() -> None:
    """Flags of runs of several processes that no cluster manager started."""
    flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0, where several processes run without a cluster manager.")
    flags.DEFINE_integer("num_processes", None, "How many processes there are.")
    flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")
    flags.DEFINE_float("join_timeout", ProcessesConfig.join, "Seconds in which all processes must have been started.")


def start_distributed(settings: dict[str, Any]) -> None:
    """Joins the other processes: by the flags, or as the cluster tells (TPU pods, SLURM, Open MPI). Alone, it does nothing.

    Args:
      settings: of the run; all processes must have been given the same.

    Raises:
      UserError: flags that are incomplete or contradict each other, processes that cannot be reached, or that differ.
    """
    given = {name: FLAGS[name].value for name in ("coordinator_address", "num_processes", "process_id")}
    present = [name for name, value in given.items() if value is not None]
    if present:
        if missing := [f"--{name}" for name in given if name not in present]:
            raise UserError(f"--{present[0]} is given without {' and '.join(missing)}; expected all three of them")
        if FLAGS.num_processes < 1:
            raise UserError(f"--num_processes is {FLAGS.num_processes}; expected an integer >= 1")
        if not 0 <= FLAGS.process_id < FLAGS.num_processes:
            raise UserError(f"--process_id is {FLAGS.process_id}; expected 0 to {FLAGS.num_processes - 1} (--num_processes less one)")
    if FLAGS.join_timeout <= 0:
        raise UserError(f"--join_timeout is {FLAGS.join_timeout:g}; expected seconds > 0")
    environment = os.environ
    workers = environment.get("TPU_WORKER_HOSTNAMES", "").split(",")
    tasks = max(int(environment.get(name) or 1) for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "MEGASCALE_NUM_SLICES"))
    if not present and len(workers) == 1 and tasks == 1:
        return
    from eesd_jax.cluster import processes

    try:
        processes.join(settings, FLAGS.join_timeout, **(given if present else {}))
    except UserError:
        raise
    except (RuntimeError, ValueError) as error:
        where = f" at {FLAGS.coordinator_address!r}" if present else ""
        raise UserError(f"cannot join the processes{where} ({str(error).splitlines()[0]})") from None


def settings_from_flags(command: types.ModuleType) -> dict[str, Any]:
    """The flags of a command, as all processes of a run must be given them."""
    own = {flag.name for flag in FLAGS.flags_by_module_id_dict()[id(command)]} - {"coordinator_address", "process_id"}
    return {f"--{name}": FLAGS[name].value for name in own}


def sampling_from_flags() -> SamplingConfig:
    """Raises UserError for values out of range."""
    return SamplingConfig(FLAGS.temperature, FLAGS.top_k, FLAGS.top_p, FLAGS.min_p)


def check_generation_flags() -> None:
    """Finds what is wrong with the flags before anything slow is started."""
    try:
        parse_arms(FLAGS.arms)
    except UserError as error:
        raise UserError(f"--arms: {error}") from None
    for name in ("max_new_tokens", "batch_size", "max_draft", "candidates"):
        if FLAGS[name].value < 1:
            raise UserError(f"--{name} is {FLAGS[name].value}; expected an integer >= 1")
    if FLAGS.candidates > 1 and "exit" not in FLAGS.arms:
        raise UserError(f"--candidates is {FLAGS.candidates}, and --arms is {','.join(FLAGS.arms)!r}; expected 1, or arms with exit")
    if FLAGS.controller is not None:
        check_controller(FLAGS.controller, "--controller")
    check_quantize(FLAGS.quantize, "--quantize")
    mesh_sizes()
    if "" in FLAGS.stop:
        raise UserError("--stop is ''; expected some text")
    sampling_from_flags()


def mesh_sizes() -> dict[str, int]:
    """What --mesh says, by axis; raises UserError where it makes no sense, or the batch does not spread evenly."""
    axes, sizes = [field.name for field in dataclasses.fields(MeshConfig)], {}
    for entry in FLAGS.mesh:
        axis, _, size = entry.partition(":")
        if axis not in axes or axis in sizes or not size.isdecimal() or int(size) < 1:
            raise UserError(
                f"--mesh is {','.join(FLAGS.mesh)!r}; expected AXIS:SIZE, each of {', '.join(axes)} at most once, as in data:2,tensor:4"
            )
        sizes[axis] = int(size)
    if FLAGS.batch_size % sizes.get("data", 1):
        raise UserError(f"--batch_size is {FLAGS.batch_size}; expected a multiple of {sizes['data']}, the size of the mesh's data axis")
    return sizes


def check_controller(name: str, flag: str) -> None:
    """Raises UserError for a controller that there is not, or that needs an exit branch where the flags give none."""
    try:
        spec = parse_controller(name, FLAGS.max_draft)
    except UserError as error:
        raise UserError(f"{flag} is {name!r}; {error}") from None
    if spec.kind == PLAIN or ("lookup" in FLAGS.arms and not spec.controller.needs_branch):
        return
    expected = f"expected --controller={PLAIN}, or --exit_branch with a folder or a hub id"
    if "exit" not in FLAGS.arms:
        raise UserError(f"{flag} is {name!r}, which needs the exit branch, and --arms is 'lookup'; expected plain, fixed:K or cost_aware")
    if FLAGS.exit_branch == "none":
        raise UserError(f"{flag} is {name!r}, which needs an exit branch, and --exit_branch is 'none'; {expected}")
    if FLAGS.exit_branch == "auto" and FLAGS.model != hub.DEMO_NAME:
        from eesd_jax.weights.branch_folder import shipped_branch

        if shipped_branch(FLAGS.model) is None:
            raise UserError(f"{flag} is {name!r}, which needs an exit branch, and none comes with model {FLAGS.model!r}; {expected}")


def load_from_flags() -> "Engine":
    """The engine that the flags ask for; a terminal is told what it waits for."""
    # Who asks for plain decoding needs no branch, and no warning that there is none.
    exit_branch = "none" if (FLAGS.exit_branch, FLAGS.controller) == ("auto", PLAIN) else FLAGS.exit_branch
    with warnings.catch_warnings(record=True) as caught, notice(f"loading {FLAGS.model} ..."):
        from eesd_jax.cluster import platforms
        from eesd_jax.engine.engine import load

        platforms.start()
        warnings.simplefilter("always", UserWarning)
        engine = load(
            FLAGS.model,
            dtype=FLAGS.dtype,
            mesh=mesh_from_flags(),
            decode_config=DecodeConfig(max_new_tokens=FLAGS.max_new_tokens, batch_size=FLAGS.batch_size, seed=FLAGS.seed),
            exit_branch=exit_branch,
            max_draft=FLAGS.max_draft,
            candidates=FLAGS.candidates,
            arms=FLAGS.arms,
            ngrams=FLAGS.ngrams,
            quantize=FLAGS.quantize,
        )
    if FLAGS.chat and not engine.has_chat_template:
        raise UserError(f"--chat is given, but model {FLAGS.model!r} has no chat template; expected --nochat (plain text) or a chat model")
    for warning in caught:
        if issubclass(warning.category, UserWarning) and is_first():
            warn(str(warning.message))
    return engine


def mesh_from_flags() -> "Mesh | None":
    """The mesh that --mesh asks for, None for one device; several processes decode on all their devices together.

    Raises:
      UserError: too few devices, or several processes and not all of them.
    """
    from eesd_jax.model.sharding import MESH_AXES, make_mesh, make_whole_mesh

    sizes = mesh_sizes()
    if not several_processes():
        return make_mesh(**sizes) if sizes else None
    import jax

    if math.prod(sizes.values()) != jax.device_count():
        raise UserError(
            f"--mesh is {','.join(FLAGS.mesh)!r} with {jax.process_count()} processes; expected one over all their devices, as in "
            f"tensor:{jax.device_count()}"
        )
    return make_whole_mesh(jax.devices(), **dict.fromkeys(MESH_AXES, 1) | sizes)


def controller_from_flags(engine: "Engine", batch: int) -> "Controller | None":
    """The controller that the flags ask for, for `batch` rows at once; None for plain decoding."""
    return build_controller(engine, FLAGS.controller or AUTO, batch)


def build_controller(engine: "Engine", name: str, batch: int) -> "Controller | None":
    """The controller of that name; a terminal is told what it waits for."""
    waits = engine.drafter is not None and name != PLAIN  # once a machine
    with notice("timing rounds ...") if waits else contextlib.nullcontext():
        return engine.controller(name, batch=batch)


@contextlib.contextmanager
def notice(text: str) -> Iterator[None]:
    """Shows on a terminal what is waited for, and wipes it out."""
    if not sys.stderr.isatty():
        yield
        return
    say(text, end="\r")
    try:
        yield
    finally:
        say(" " * len(text), end="\r")


def say(text: str, end: str = "\n") -> None:
    """Writes to stderr; nobody may be listening there, which is no reason to stop."""
    with contextlib.suppress(OSError):
        print(text, end=end, file=sys.stderr, flush=True)


def note(text: str) -> None:
    """One line of statistics on stderr, of the process that writes."""
    if is_first():
        say(text)


def warn(message: str) -> None:
    """One line on stderr about something that goes on nevertheless."""
    say(f"warning: {' '.join(message.split())}")


def _show_warning(message: Warning | str, category: type[Warning], *details: object) -> None:
    """Stands in for Python's own, which prints a line of our code as well."""
    del details
    if issubclass(category, UserWarning) and is_first():
        warn(str(message))


_closed_streams: set[str] = set()


def stdout_is_closed() -> bool:
    """Whether the command was started without one, as with `>&-`: then whatever is printed is lost."""
    return "stdout" in _closed_streams


def _open_closed_streams() -> None:
    """Has standard streams that are closed, as `>&-` leaves them, lead nowhere: else the next file that is opened takes their place."""
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is None:
            try:
                os.fstat(number)
            except OSError:
                os.dup2(os.open(os.devnull, os.O_RDWR), number)
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115  open until the end
            _closed_streams.add(name)


# The machine's, not ours: a full disk, a quota, a device that fails, a disk that can only be read.
_OF_THE_MACHINE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)


def run(main: Callable[[Sequence[str]], None]) -> NoReturn:
    """Runs a command: parses flags, and turns a user's mistake into one line on stderr and exit code 2."""
    _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal that knows no emoji is no reason to stop
    command = sys.modules[main.__module__]
    warnings.showwarning = _show_warning

    def parse(argv: Sequence[str]) -> Sequence[str]:
        if any(argument in ("-h", "-help", "--help") for argument in argv[1:]):
            _print_help(command)
        try:
            if "config" in FLAGS:
                from eesd_jax.distill.experiment import check_config_arguments

                check_config_arguments(argv[1:])
            rest = FLAGS(argv)
        except UserError as error:
            _fail(str(error))
        except (flags.Error, ValueError) as error:  # ValueError: --noX=value
            _fail(_flag_error(error))
        if len(rest) > 1:
            _fail(f"unexpected argument {rest[1]!r}; expected --flag=value")
        _quieten()
        return rest

    def guarded(argv: Sequence[str]) -> None:
        try:
            main(argv)
            sys.stdout.flush()
        except BaseException as error:
            _end(error)
            raise
        finally:
            if processes := _processes():
                processes.leave()

    app.run(guarded, flags_parser=parse)


def _end(error: BaseException) -> None:
    """Ends a command with one line for what is not a bug of ours; returns where it is one, or where the command has chosen its end."""
    processes = _processes()
    match error:
        case UserError():
            _fail(str(error))
        case ModuleNotFoundError() if extra := _EXTRAS.get(library := str(error.name).partition(".")[0]):
            _fail(f"{library} is not installed; expected the extra {extra!r}: pip install -e '.[{extra}]'")
        case KeyboardInterrupt():
            if sys.stderr.isatty():
                say("")
            if processes:
                processes.fail("interrupted", 130, "")
            _leave(130)
        case BrokenPipeError():  # who read our output has seen enough, as in `| head`
            _leave(1)
        case OSError() if error.errno in _OF_THE_MACHINE:
            _fail(f"cannot write {error.filename or 'output'} ({error.strerror})")
        case Exception() if processes:
            processes.wait_for_news()
            processes.fail(" ".join(f"{type(error).__name__}: {error}".split())[:300], 1, traceback.format_exc())


def _leave(code: int) -> NoReturn:
    """Exits. What cannot be printed any more leads nowhere: Python would try it again at its end, and complain."""
    try:
        sys.stdout.flush()
    except OSError:
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def _print_help(command: types.ModuleType) -> NoReturn:
    try:
        print(_help(command), flush=True)
    except BrokenPipeError:
        _leave(1)
    except OSError as error:
        _fail(f"cannot write stdout ({error.strerror})")
    _leave(0)


def _quieten() -> None:
    """Leaves stderr to us: a mistake is one line there."""
    if not FLAGS["verbosity"].present:
        absl_logging.set_verbosity(absl_logging.WARNING)  # absl shows what JAX logs about every backend that it looked for
    for library in ("transformers", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.ERROR)


def _fail(message: str) -> NoReturn:
    message = " ".join(message.split())
    if processes := _processes():
        processes.fail(message, 2, f"error: {message}")
    say(f"error: {message}")
    _leave(2)


def _processes() -> types.ModuleType | None:
    """`eesd_jax.cluster.processes` where it is in use; it imports JAX."""
    return sys.modules.get("eesd_jax.cluster.processes")


def several_processes() -> bool:
    """Whether this is one of several that run together."""
    return (processes := _processes()) is not None and processes.joined()


def is_first() -> bool:
    """Whether this is the process that writes and prints: process 0 of several, or the only one."""
    return not several_processes() or _processes().is_first()


def _flag_error(error: flags.Error | ValueError) -> str:
    """What absl found, in our words: the value, and what was expected."""
    message = str(error).splitlines()[0]
    if bad_value := re.match(r"flag --([\w.]+)=(.*?): ", message):
        name, value = bad_value.groups()
        expected = "true or false" if FLAGS[name].boolean else FLAGS[name].parser.syntactic_help or "another value"
        return f"--{name} is {value!r}; expected {expected}"
    return f"{message}; --help lists all flags"


def _help(command: types.ModuleType) -> str:
    """What a command does and its own flags, in the order in which it defines them."""
    indent = 28
    lines = [(command.__doc__ or "").strip(), "", "Flags:"]
    for flag in FLAGS.flags_by_module_id_dict().get(id(command), []):
        if flag.boolean:
            left = f"--[no]{flag.name}"
        elif flag.default in (None, []):
            left = f"--{flag.name}=..."
        else:
            left = f"--{flag.name}={flag.default}"
        width = max(60, min(120, shutil.get_terminal_size().columns))
        text = textwrap.wrap(flag.help.split(";\n")[0], width - indent)  # behind it, absl explains flags that may be repeated
        lines.append(f"  {left:<{indent - 3}} {text[0]}")
        lines += [" " * indent + line for line in text[1:]]
    return "\n".join(lines)
