"""What the README shows works: its Python block runs; its flags and make targets exist, and those of the page with the figures."""

import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PAGES = ("README.md", "docs/performance.md")
README = "\n".join((ROOT / page).read_text(encoding="utf-8") for page in PAGES)
COMMAND = "infer/generate.py"  # whose flags are meant where the README names no command


@pytest.mark.demo
def test_python_blocks_run(capsys):
    blocks = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
        assert capsys.readouterr().out.strip()


def test_flags_exist():
    named: dict[str, set[str]] = {}
    for line in README.replace("\\\n", "").splitlines():  # a command goes on behind a backslash
        script = re.search(r"\bpython (\S+\.py)", line)
        named.setdefault(script[1] if script else COMMAND, set()).update(re.findall(r"(?<![\w-])--(\w+)", line))
    assert {"model", "prompt"} <= named[COMMAND]
    for script, flags in named.items():
        if flags:
            result = subprocess.run([sys.executable, ROOT / script, "--help"], capture_output=True, text=True, check=True)
            assert flags <= {"help", *re.findall(r"^  --(?:\[no\])?(\w+)", result.stdout, re.MULTILINE)}, script


def test_scripts_and_make_targets_exist():
    for script in re.findall(r"\b(\w+/\w+\.py)\b", README):
        assert (ROOT / script).is_file(), script
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for target in re.findall(r"\bmake ([a-z-]+)(?=`|  )", README):
        assert target in targets, target
