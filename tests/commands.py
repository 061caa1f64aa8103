"""The project's scripts as modules, run in this process.

with commands.loaded("infer/generate.py") as module:
    result = commands.run(module, "--model=tiny", "--prompt=hello")
"""

import contextlib
import importlib.util
import io
import pathlib
import sys
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import jax
import pytest
from absl import flags

from eesd_jax import cli
from eesd_jax.distill import experiment

ROOT = pathlib.Path(__file__).parent.parent
_CACHE_SETTINGS = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")


class Result(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


class Stream(io.TextIOWrapper):
    """stdin, stdout or stderr in memory, which may say that it is a terminal."""

    def __init__(self, content: str = "", in_terminal: bool = False):
        super().__init__(io.BytesIO(content.encode("utf-8", "surrogateescape")), encoding="utf-8", write_through=True)
        self._in_terminal = in_terminal

    def isatty(self) -> bool:
        return self._in_terminal

    def content(self) -> str:
        return self.buffer.getvalue().decode()


@contextlib.contextmanager
def loaded(script: str) -> Iterator[ModuleType]:
    """A script of the repository; its flags and what it sets in jax are taken away afterwards, so that others can define theirs."""
    spec = importlib.util.spec_from_file_location(script.removesuffix(".py").replace("/", "_"), ROOT / script)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    settings = {name: getattr(jax.config, name) for name in _CACHE_SETTINGS}
    try:
        yield module
    finally:
        for name, value in settings.items():
            jax.config.update(name, value)
        for flag in list(flags.FLAGS.flags_by_module_id_dict()[id(module)]):  # deleting changes the list
            delattr(flags.FLAGS, flag.name)
        _forget_config_flags()
        del sys.modules[spec.name]


def run(module: ModuleType, *arguments: str, stdin: str = "", terminals: str = "") -> Result:
    """Runs it until it ends.

    Args:
      terminals: those of "out" and "err" that are terminals.
    """
    if "config" in flags.FLAGS:  # every run defines its own flags, one a field
        _forget_config_flags()
        experiment.define_config_flag()
    for name in flags.FLAGS:
        flags.FLAGS[name].unparse()
    out, err = Stream(in_terminal="out" in terminals), Stream(in_terminal="err" in terminals)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(warnings, "showwarning", warnings.showwarning)
        patch.setattr(sys, "argv", [pathlib.Path(module.__file__).name, *arguments])
        for name, stream in (("stdin", Stream(stdin)), ("stdout", out), ("stderr", err)):
            patch.setattr(sys, name, stream)
        with pytest.raises(SystemExit) as end:
            cli.run(module.main)
    return Result(end.value.code or 0, out.content(), err.content())


def _forget_config_flags() -> None:
    for name in [name for name in flags.FLAGS if name.split(".")[0] == "config"]:
        delattr(flags.FLAGS, name)


def assert_refused(result: Result, *named: str) -> None:
    """One line on stderr, which says all of `named`, exit code 2, and nothing on stdout."""
    assert (result.code, result.out) == (2, ""), result
    assert result.err.startswith("error: ")
    assert result.err.endswith("\n")
    assert result.err.count("\n") == 1, result.err
    for text in named:
        assert text in result.err
