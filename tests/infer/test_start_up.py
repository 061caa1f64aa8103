"""A command is quick to complain, and quick to start: nothing slow is imported before the flags are checked, nothing compiled twice."""

import os
import pathlib
import resource
import subprocess
import sys

import pytest

from eesd_jax.weights import hub

SCRIPT = pathlib.Path(__file__).parent.parent.parent / "infer" / "generate.py"

IMPORTED_BY = """
import runpy, sys
sys.argv = [{script!r}, {argument!r}]
try:
    runpy.run_path({script!r}, run_name="__main__")
finally:
    print("slow:", *({{"jax", "transformers"}} & set(sys.modules)), file=sys.stderr)
"""


@pytest.mark.parametrize("argument", ["--help", "--no_such_flag", "--temperature=-1", "--controller=nonsense"])
def test_flags_are_checked_before_anything_slow_is_imported(argument):
    program = IMPORTED_BY.format(script=str(SCRIPT), argument=argument)
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == (0 if argument == "--help" else 2), result.stderr
    assert result.stderr.splitlines()[-1] == "slow:"


@pytest.mark.demo
def test_a_second_start_compiles_nothing(tmp_path):
    (tmp_path / hub.DEMO_FILE).symlink_to(hub.fetch_demo())
    environment = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")}

    def start() -> float:
        """Seconds of CPU time: those of the clock are fewer where the machine is idle, and anything where it is not."""
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, SCRIPT, "--prompt=Why is the sky blue?", "--controller=plain", "--max_new_tokens=1"]
        subprocess.run(command, env=environment | {"EESD_JAX_CACHE": str(tmp_path)}, check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    def compiled() -> set[str]:
        return {path.name for path in (tmp_path / "compiled").iterdir() if path.name.endswith("-cache")}

    first = start()
    programs = compiled()
    assert programs
    assert start() < first
    assert compiled() == programs
