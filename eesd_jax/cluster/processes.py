"""Joins the processes of one run, checks that they have the same code, libraries, settings and disk, and ends all when one has ended.

Everything goes through the key-value store of JAX's coordination service, not through the devices, which are the first to hang where
processes differ. A single process skips all of it. Noticing an end is left to `lifeline.py`.
"""

import contextlib
import hashlib
import importlib.metadata
import itertools
import json
import os
import pathlib
import platform
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from etils import epath
from jax._src import distributed  # the one way to the store: what is public of it goes through devices

import eesd_jax
from eesd_jax.cluster.lifeline import Lifeline
from eesd_jax.config import LifelineConfig, ProcessesConfig
from eesd_jax.errors import UserError

# Libraries whose versions decide about programs, collectives and files.
_LIBRARIES = ("jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "transformers")

_exchanges = itertools.count()
_lifeline: Lifeline | None = None


class Facts(NamedTuple):
    """The facts that processes compare. code: hash of every source file of this package. settings: of the run, by dotted names."""

    host: str
    code: dict[str, str]
    versions: dict[str, str]
    settings: dict[str, Any]


def joined() -> bool:
    """Says whether this is one of several processes; unlike `jax.process_count()` it starts no devices."""
    return jax.distributed.is_initialized() and distributed.global_state.num_processes > 1


def is_first() -> bool:
    """Says whether this is the process that writes and prints: process 0, or the only one."""
    return distributed.global_state.process_id == 0


def join(settings: dict[str, Any], timeout: float, **who: Any) -> None:
    """Joins the other processes, and checks that all are alike.

    Args:
      settings: of the run, the same for all processes; may be nested.
      timeout: seconds within which all must have joined.
      who: arguments of `jax.distributed.initialize`; none where the cluster tells.

    Raises:
      UserError: a process differs; the same on every process.
    """
    with _ends_at(timeout, who):
        # Our timeout must be the shorter one: JAX's ends the process with a C++ stack.
        jax.distributed.initialize(initialization_timeout=int(timeout) + 60, **who)
    if not joined():
        return
    facts = Facts(socket.gethostname(), source_hashes(), versions(), flatten(settings))
    _start_lifeline(facts.host)
    check_same([Facts(**found) for found in exchange(facts._asdict())])
    devices = jax.local_devices()
    check_devices(exchange((facts.host, len(devices), devices[0].device_kind)))


@contextlib.contextmanager
def _ends_at(timeout: float, who: dict[str, Any]) -> Iterator[None]:
    """Ends the process with one line if the context lasts longer than `timeout` seconds."""

    def end() -> None:
        where = f" at {who['coordinator_address']!r}" if who else ""
        count = f" all {who['num_processes']}" if who else " all"
        print(
            f"error: not{count} processes have joined{where} within {timeout:g} s (--join_timeout); "
            "expected the same command to be started on every host, each with its own --process_id",
            file=sys.stderr,
            flush=True,
        )
        os._exit(2)

    timer = threading.Timer(timeout, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _start_lifeline(host: str) -> None:
    """Connects this process to process 0, or process 0 to all others."""
    global _lifeline
    state = distributed.global_state
    names = [f"process {i} ({other})" for i, other in enumerate(exchange(host))]
    line = Lifeline(state.process_id, names, LifelineConfig())
    port, token = from_first(line.listen)
    connected = not is_first()
    if connected:
        try:
            line.connect(state.coordinator_address.rpartition(":")[0].strip("[]"), port, token)
        except OSError as error:
            warnings.warn(f"{names[0]} cannot be reached at port {port} ({error}); a lost process will show late", stacklevel=2)
            connected = False
    all_connected = {process for process, found in enumerate(exchange(connected)) if found}
    if is_first():
        line.wait_for(all_connected)
    if is_first() or connected:
        _lifeline = line


def exchange(value: Any) -> list[Any]:
    """Exchanges a JSON value between all processes: returns theirs in order. All must call it, and each waits for all."""
    if not joined():
        return [json.loads(json.dumps(value))]
    state, call = distributed.global_state, next(_exchanges)
    state.client.key_value_set(f"eesd_jax/{call}/{state.process_id}", json.dumps(value))
    patience = int(ProcessesConfig.exchange * 1000)
    keys = [f"eesd_jax/{call}/{process}" for process in range(state.num_processes)]
    return [json.loads(state.client.blocking_key_value_get(key, patience)) for key in keys]


def from_first(make: Callable[[], Any]) -> Any:
    """Calls `make` on process 0 only, and returns its JSON value on every process."""
    return exchange(make() if is_first() else None)[0]


def leave() -> None:
    """Says that this process is done. Call it last: then the others do not take its end for a failure."""
    if _lifeline is not None:
        _lifeline.leave()


def fail(why: str, code: int, text: str) -> None:
    """Ends this process with that text on stderr, and tells all others why; does nothing in a single process."""
    if _lifeline is not None:
        _lifeline.fail(why, code, text)


def wait_for_news() -> None:
    """Ends this process, with a message, if another has ended, which can show here as any error; else returns."""
    if _lifeline is not None:
        _lifeline.wait_for_news()


# Checks that all are alike ----------------------------------------------------------------------------------------------------------------


def source_hashes() -> dict[str, str]:
    """Hashes every source file of this package, by its path."""
    package = pathlib.Path(eesd_jax.__file__).parent
    files = sorted(package.rglob("*.py"))
    return {file.relative_to(package.parent).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()[:8] for file in files}


def versions() -> dict[str, str]:
    """Lists the versions of Python and of those libraries that are installed."""
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens nested dictionaries into one, by dotted names."""
    flat = {}
    for name, value in settings.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def check_same(facts: list[Facts]) -> None:
    """Raises UserError where a process has other code, libraries or settings than process 0; the line names both and what differs."""
    first = facts[0]
    for process, other in enumerate(facts[1:], start=1):
        names = f"process {process} ({other.host})", f"process 0 ({first.host})"
        if files := _different(other.code, first.code):
            path, more = files[0], f" and {len(files) - 1} more files" if len(files) > 1 else ""
            raise UserError(
                f"{names[0]} has other code than {names[1]}: {path}{more} (hash {other.code.get(path, 'of none')}, there "
                f"{first.code.get(path, 'of none')}); expected the same version of eesd_jax on every process"
            )
        if libraries := _different(other.versions, first.versions):
            listed = ", ".join(f"{name} {other.versions.get(name)}, there {first.versions.get(name)}" for name in libraries)
            raise UserError(f"{names[0]} has other libraries than {names[1]}: {listed}; expected the same versions on every process")
        if fields := _different(other.settings, first.settings):
            listed = "; ".join(f"{name} is {other.settings.get(name)!r}, there {first.settings.get(name)!r}" for name in fields[:6])
            raise UserError(f"{names[0]} has other settings than {names[1]}: {listed}; expected the same ones on every process")


def _different(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    return [name for name in sorted(found.keys() | wanted.keys()) if found.get(name) != wanted.get(name)]


def check_devices(found: list[tuple[str, int, str]]) -> None:
    """Raises UserError where a process has another number or kind of devices than process 0; `found`: host, number and kind of each."""
    host, count, kind = found[0]
    for process, (other_host, other_count, other_kind) in enumerate(found[1:], start=1):
        if (other_count, other_kind) != (count, kind):
            raise UserError(
                f"process {process} ({other_host}) has {other_count} devices ({other_kind}), process 0 ({host}) has {count} ({kind}); "
                "expected as many of the same kind on every process"
            )


def check_shared(folder: epath.Path, what: str) -> None:
    """Raises UserError where a process does not see what process 0 writes to a folder, which is made if need be.

    Args:
      what: the folder's name in messages.
    """
    if not joined():
        return
    marker, problem, made = None, None, []
    if is_first():
        try:
            made = [path for path in (folder, *folder.parents) if not path.exists()]
            folder.mkdir(parents=True, exist_ok=True)
            marker = f".process_0_{os.getpid()}_{time.time_ns()}"
            (folder / marker).write_text("looked for by the other processes")
        except Exception as error:  # of a bucket: whatever its library raises
            problem = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
    marker, problem = exchange((marker, problem))[0]
    if problem is not None:
        raise UserError(f"{what} is {os.fspath(folder)!r}, which cannot be written to ({problem}); expected a folder to write to")
    seen = exchange((socket.gethostname(), _appears(folder / marker)))
    blind = [f"process {process} ({host})" for process, (host, sees) in enumerate(seen) if not sees]
    if is_first():
        with contextlib.suppress(Exception):
            (folder / marker).unlink()
            for path in made:  # so that a failure from here on leaves nothing there
                path.rmdir()
    if blind:
        raise UserError(
            f"{what} is {os.fspath(folder)!r}, where {', '.join(blind[:6])} cannot see what process 0 ({seen[0][0]}) writes; "
            "expected a folder that all processes share: on a shared disk, or in a bucket (gs://)"
        )


def _appears(path: epath.Path) -> bool:
    """Waits a while for a file, and says whether it is there: network disks remember for a while what was not there."""
    deadline = time.monotonic() + ProcessesConfig.shared
    while True:
        with contextlib.suppress(Exception):  # no permission to look counts as not there
            if path.exists():
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.5)
