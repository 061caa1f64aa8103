"""A command is quick to complain, and quick to start: nothing slow is imported before the flags are checked, nothing compiled twice."""

import os
import pathlib
import resource
import subprocess
import sys

import pytest

from eesd_jax.weights import hub

ROOT = pathlib.Path(__file__).parent.parent.parent
SCRIPT = ROOT / "infer" / "generate.py"

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


def test_the_library_imports_nothing_slow_that_it_does_not_need_yet():
    """Neither transformers nor huggingface_hub, which take as long as JAX: a model is to be loaded first."""
    program = "import sys, eesd_jax.engine.engine; print(*({'transformers', 'huggingface_hub', 'optax', 'torch'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (result.stdout.strip(), result.stderr) == ("", "")


WITHOUT_EXTRAS = """
import runpy, sys

class Nothing:
    def find_spec(self, name, *_):
        if name.partition(".")[0] in ("array_record", "grain", "matplotlib", "tensorboardX", "tensorflow_datasets"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Nothing())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_decoding_needs_no_library_of_an_extra_and_training_names_what_is_missing(tmp_path):
    def run(script: str, *arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", WITHOUT_EXTRAS, str(ROOT / script), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)

    decoding = run("infer/generate.py", "--model=tiny", "--prompt=hello", "--controller=plain", "--max_new_tokens=1", "--exit_branch=none")
    assert decoding.returncode == 0, decoding.stderr
    training = run("train/distill.py", f"--config={ROOT / 'configs' / 'tiny.py'}")
    assert training.returncode == 2
    (line,) = training.stderr.splitlines()
    assert "is not installed" in line
    assert "pip install -e '.[train]'" in line
    assert not list(tmp_path.iterdir())


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
