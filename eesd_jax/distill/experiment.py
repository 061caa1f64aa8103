"""Config files: one experiment each, `configs/X.py` with a `get_config()` that changes what it wants of `base_config()`.

On the command line `--config=configs/X.py --config.optimizer.learning_rate=3e-4` changes single fields. Values become an `ExperimentConfig`
at once, so that every other module works with typed, frozen, checked dataclasses.
"""

import dataclasses
import os
import re
import runpy
import traceback
from collections.abc import Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from eesd_jax.config import ExperimentConfig
from eesd_jax.errors import UserError

flags.disclaim_key_flags()  # the flag belongs to the command that asked for it

_FLAG = "config"
_FORM = "a function get_config() that changes what it wants of base_config() and returns it"
_TYPE_NAMES = {bool: "true or false", int: "an integer", float: "a number", str: "a text"}


def base_config() -> ConfigDict:
    """Every field of `ExperimentConfig` with its default, to be changed by a config file."""
    return ConfigDict(dataclasses.asdict(ExperimentConfig()))


def define_config_flag() -> None:
    """--config=FILE and --config.FIELD=VALUE."""
    config_flags.DEFINE_config_file(_FLAG, None, "The experiment: a file such as configs/smollm135m.py; --config.FIELD=VALUE changes it.")
    flags.declare_key_flag(_FLAG)


def check_config_arguments(argv: Sequence[str]) -> None:
    """Finds what absl would report with a traceback, or only when the config is read: files that are missing or broken, unknown fields.

    Raises:
      UserError: names the file or the field, and what was expected.
    """
    paths, fields = [], []
    for i, argument in enumerate(argv):
        if match := re.fullmatch(rf"--?{_FLAG}(?:=(.*))?", argument, re.DOTALL):
            paths.append(match[1] if match[1] is not None else (argv[i + 1] if i + 1 < len(argv) else ""))
        elif match := re.match(rf"--?(?:no)?{_FLAG}\.([^=]+)", argument):
            fields.append(match[1])
    if not paths:
        raise UserError("--config is missing; expected --config=FILE, as in configs/tiny.py")
    for path in paths:  # absl reads all of them, and takes the last
        if not os.path.isfile(path.partition(":")[0]):
            raise UserError(f"--config is {path!r}, and there is no such file; expected a config file, as in configs/tiny.py")
        _try_file(path)
    for field in fields:
        node: Any = base_config()
        for name in field.split("."):
            if not isinstance(node, ConfigDict) or name not in node:
                known = f"expected one of {', '.join(sorted(node))}" if isinstance(node, ConfigDict) else "it has no fields of its own"
                raise UserError(f"--config.{field}: there is no field {name!r}; {known}")
            node = node[name]
        if isinstance(node, ConfigDict):
            raise UserError(f"--config.{field} is a group of fields; expected one of {', '.join(sorted(node))} behind it")


def _try_file(path: str) -> None:
    """Runs a config file, as absl will do again: what goes wrong there it shows as a traceback, or only when the config is used."""
    name, _, argument = path.partition(":")
    try:
        get_config = runpy.run_path(name).get("get_config")
        config = None if get_config is None else get_config(argument) if argument else get_config()
    except Exception as error:  # whatever the author's code raises
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == name]
        if isinstance(error, SyntaxError) and error.filename == name:
            lines = [error.lineno]
        where = f", line {lines[-1]}" if lines else ""
        reason = error.msg if isinstance(error, SyntaxError) else str(error).strip().split("\n\n")[0]
        raise UserError(f"config file {name}{where}: {type(error).__name__}: {reason}; expected {_FORM}") from None
    if get_config is None:
        raise UserError(f"config file {name} has no get_config; expected {_FORM}")
    if not isinstance(config, ConfigDict):
        raise UserError(f"config file {name}: get_config() gives {config!r}; expected {_FORM}")


def config_from_flags() -> ExperimentConfig:
    """The experiment that --config asks for; raises UserError for what is wrong with it."""
    flag = flags.FLAGS[_FLAG]
    return to_dataclass(flag.value, str(flag.config_filename))


def to_dataclass(config: ConfigDict, source: str) -> ExperimentConfig:
    """Checks the fields of a config and their types.

    Raises:
      UserError: names a field that is unknown, or whose value has another type than its default.
    """
    return _build(ExperimentConfig, config.to_dict(), source, "")


def _build(kind: type, values: dict[str, Any], source: str, prefix: str) -> Any:
    fields = {field.name: field for field in dataclasses.fields(kind)}
    arguments = {}
    for name, value in values.items():
        if name not in fields:
            raise UserError(f"{source}: there is no field {prefix}{name}; expected one of {', '.join(sorted(fields))}")
        default = fields[name].default
        if dataclasses.is_dataclass(default):
            if not isinstance(value, dict):
                raise UserError(f"{source}: {prefix}{name} is {value!r}; expected fields {', '.join(vars(default))}")
            arguments[name] = _build(type(default), value, source, f"{prefix}{name}.")
        else:
            arguments[name] = _fit(value, default, f"{source}: {prefix}{name}")
    return kind(**arguments)


def _fit(value: Any, default: Any, what: str) -> Any:
    if isinstance(default, tuple):
        if not isinstance(value, (tuple, list)):
            raise UserError(f"{what} is {value!r}; expected a tuple such as {default!r}")
        return tuple(_fit(item, default[0], what) for item in value)
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not type(default):
        raise UserError(f"{what} is {value!r}; expected {_TYPE_NAMES[type(default)]}")
    return value


def to_dict(config: ExperimentConfig) -> dict[str, Any]:
    """Plain nested dictionaries, for JSON."""
    return dataclasses.asdict(config)
