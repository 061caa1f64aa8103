"""Commands as several processes of this machine, which find each other.

processes = pods.start("infer/generate.py", 2, "--model=tiny", "--mesh=tensor:2", environment=pods.environment(tmp_path))
errors = pods.finish(processes)
"""

import os
import pathlib
import socket
import subprocess
import sys
from collections.abc import Sequence
from typing import NamedTuple

import surroundings

ROOT = pathlib.Path(__file__).parent.parent
PATIENCE = 300  # seconds, for a machine that does other things as well


class End(NamedTuple):
    """How a process ended. err: without what JAX itself logs."""

    code: int
    out: str
    err: str


def environment(cache: pathlib.Path, devices: int = 1) -> dict[str, str]:
    """So many virtual devices a process, and measured costs in a cache of their own."""
    ours = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": surroundings.xla_flags(devices), "EESD_JAX_CACHE": str(cache)}
    return os.environ | ours


def start(
    script: str,
    count: int,
    *arguments: str,
    environment: dict[str, str],
    own: dict[int, Sequence[str]] | None = None,
    folders: dict[int, pathlib.Path] | None = None,
    missing: Sequence[int] = (),
) -> list[subprocess.Popen]:
    """Starts them.

    Args:
      own: further arguments of single processes. folders: where single ones are started. missing: those that nobody starts.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    command = [sys.executable, ROOT / script, *arguments, f"--coordinator_address={address}", f"--num_processes={count}"]
    return [
        subprocess.Popen(
            [*command, f"--process_id={i}", *(own or {}).get(i, ())],
            env=environment,
            cwd=(folders or {}).get(i),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
        if i not in missing
    ]


def finish(processes: list[subprocess.Popen]) -> list[End]:
    """Waits for all."""
    try:
        ends = [process.communicate(timeout=PATIENCE) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [End(process.returncode, _ours(out), _ours(err)) for process, (out, err) in zip(processes, ends, strict=True)]


def _ours(text: str) -> str:
    return "".join(line for line in text.splitlines(keepends=True) if not line.startswith("[Gloo]"))
