"""Checks what a program gives to the library, before any of it reaches a jitted program.

There nothing can be refused any more: an id outside the vocabulary reads another token's row, and an empty prompt another row's end.
So each message names the place, the value, and what was expected. Strings are sequences of letters to Python; where several texts are
expected, one text is taken as one.
"""

import dataclasses
import difflib
import os
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh

from eesd_jax.config import DecodeConfig, SamplingConfig
from eesd_jax.decode.controllers import AUTO, Controller, known_names
from eesd_jax.engine.prompts import is_unicode
from eesd_jax.errors import UserError, integer, shown
from eesd_jax.model.config import ModelConfig
from eesd_jax.model.sharding import MESH_AXES

_SAMPLING = tuple(field.name for field in dataclasses.fields(SamplingConfig))
_MESSAGE = "{'role': '...', 'content': '...'}"
ENCODING = ("chat", "split_special_tokens")  # those of calls that take texts
_OPTIONS = ("stop", "sampling", *_SAMPLING, "max_new_tokens", "batch_size", "controller")


@dataclasses.dataclass(frozen=True)
class Options:
    """How texts are generated: the checked form of what `Engine.generate_ids` documents.

    stop: texts. sampling: how tokens are drawn. max_new_tokens: of each row. batch_size: the least number of rows.
    controller: as given, a name or an object.
    """

    stop: tuple[str, ...]
    sampling: SamplingConfig
    max_new_tokens: int
    batch_size: int
    controller: Controller | str | None


def options(given: Mapping[str, Any], defaults: DecodeConfig) -> Options:
    """Checks the keywords of a call, given by name.

    Raises:
      UserError: an unknown keyword, or a value that cannot be used.
    """
    for name in given:
        if name not in _OPTIONS:
            known = ["seeds", *ENCODING, *_OPTIONS]
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            meant = f"{close[0]} (all there are: {', '.join(known)})" if close else f"one of {', '.join(known)}"
            raise UserError(f"there is no option {name!r}; expected {meant}")
    sampling = given.get("sampling", SamplingConfig())
    if not isinstance(sampling, SamplingConfig):
        raise UserError(f"sampling is {shown(sampling)}; expected a SamplingConfig, as in SamplingConfig(temperature=0.7)")
    sampling = dataclasses.replace(sampling, **{name: given[name] for name in _SAMPLING if name in given})
    budget, batch_size = given.get("max_new_tokens"), given.get("batch_size")
    return Options(
        stop_texts(given.get("stop")),
        sampling,
        defaults.max_new_tokens if budget is None else positive(budget, "max_new_tokens"),
        1 if batch_size is None else positive(batch_size, "batch_size"),
        controller(given.get("controller", AUTO)),
    )


def flag(value: Any, what: str) -> bool | None:
    """Checks a choice of yes, no, and the default, which is None."""
    if not isinstance(value, bool | None):
        raise UserError(f"{what} is {shown(value)}; expected True, False or None")
    return value


def positive(value: Any, what: str) -> int:
    """Checks a count that is at least 1."""
    return integer(value, what, "an integer >= 1", least=1)


def stop_texts(stop: Any) -> tuple[str, ...]:
    """Checks stop strings; a text is one, None is none."""
    if stop is None:
        return ()
    if isinstance(stop, str):
        if not stop:
            raise UserError("stop is ''; expected some text")
        return (str(stop),)
    texts = items(stop, "stop", "texts that end an answer")
    for i, text in enumerate(texts):
        if not isinstance(text, str) or not text:
            raise UserError(f"stop[{i}] is {shown(text)}; expected a text that is not empty")
    return tuple(map(str, texts))


def items(values: Any, what: str, expected: str) -> list[Any]:
    """Takes what is a sequence of several things, and no text and no mapping, as a list."""
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable) or getattr(values, "ndim", 1) == 0:
        raise UserError(f"{what} is {shown(values)}; expected {expected}")
    return list(values)


def controller(given: Any) -> Controller | str | None:
    """Checks a controller, the name of one, or None for plain decoding."""
    if given is None or isinstance(given, str | Controller):
        return given
    expected = f"an instance of a class derived from eesd_jax.Controller, the name of one ({known_names()}), or None"
    raise UserError(f"controller is {shown(given)}; expected {expected}")


def seeds(given: Any, rows: int) -> list[int]:
    """Checks the seeds of so many rows."""
    found = [integer(seed, f"seeds[{i}]") for i, seed in enumerate(items(given, "seeds", "an integer for each prompt"))]
    if len(found) != rows:
        raise UserError(f"{len(found)} seeds for {rows} prompts; expected one each")
    return found


def rows(prompts: Any, config: ModelConfig) -> list[list[int]]:
    """Checks the token ids of several prompts: that each has some, that they fit the context, and that the model has them all."""
    return [row(prompt, f"prompts[{i}]", config) for i, prompt in enumerate(items(prompts, "prompts", "a row of token ids for each text"))]


def row(prompt: Any, what: str, config: ModelConfig) -> list[int]:
    """Checks the token ids of one prompt."""
    texts = " (generate_batch takes texts)" if isinstance(prompt, str) else ""
    ids = items(prompt, what, f"a row of token ids{texts}")
    if not ids:
        raise UserError(f"{what} is []; expected at least one token id")
    check_length(len(ids), what, config)
    last = config.vocab_size - 1
    expected = f"a token id of the model's vocabulary, 0 to {last}"
    return [integer(token, f"{what}[{place}]", expected, least=0, most=last) for place, token in enumerate(ids)]


def check_length(tokens: int, what: str, config: ModelConfig) -> None:
    """Raises UserError for a prompt that leaves no room in the context."""
    context = config.context_length
    if tokens >= context:
        raise UserError(f"{what} has {tokens} tokens; the model's context is {context}, of which at least one must be left")


def is_conversation(prompt: Any) -> bool:
    """Whether this is one list of messages."""
    return isinstance(prompt, list | tuple) and bool(prompt) and all(isinstance(message, Mapping) for message in prompt)


def messages(prompt: Any, what: str) -> list[dict[str, Any]]:
    """Checks a list of messages, each with a role and a content that are texts."""
    expected = f"a text, or a list of messages {_MESSAGE}"
    found = items(prompt, what, expected)
    if not found:
        raise UserError(f"{what} is []; expected {expected}")
    for i, message in enumerate(found):
        texts = [message.get(name) for name in ("role", "content")] if isinstance(message, Mapping) else [None]
        if not all(isinstance(text, str) for text in texts):
            ids = " (generate_ids takes token ids)" if isinstance(message, int) else ""
            raise UserError(f"{what}[{i}] is {shown(message)}; expected a message {_MESSAGE} of texts{ids}")
        for text in texts:
            check_unicode(text, f"{what}[{i}]")
    return [dict(message) for message in found]


def check_unicode(text: str, what: str) -> None:
    """Raises UserError for a text with half characters, which no tokenizer takes."""
    if not is_unicode(text):
        raise UserError(f"{what} is {shown(text)}; expected UTF-8 text, without half characters")


def name_or_path(value: Any, what: str) -> str:
    """Checks the name of a model, a branch or a file, which may be a path object."""
    if not isinstance(value, str | os.PathLike) or not isinstance(name := os.fspath(value), str):
        raise UserError(f"{what} is {shown(value)}; expected a name or a path")
    return name


def dtype_name(dtype: Any) -> str:
    """Checks a dtype, given by its name or as JAX and numpy have it; None is this platform's default."""
    if dtype is None:
        return "float32" if jax.default_backend() == "cpu" else "bfloat16"
    try:
        name = dtype if isinstance(dtype, str) else jnp.dtype(dtype).name
    except TypeError:
        name = None
    if name not in ("float32", "bfloat16"):
        raise UserError(f"dtype is {shown(dtype)}; expected float32 or bfloat16")
    return name


def check_mesh(mesh: Any) -> None:
    """Raises UserError for anything but None or a mesh with the axes that the weights are placed by."""
    expected = f"a mesh of eesd_jax.model.sharding.make_mesh, with the axes {', '.join(MESH_AXES)}"
    if mesh is None:
        return
    if not isinstance(mesh, Mesh):
        raise UserError(f"mesh is {shown(mesh)}; expected {expected}")
    if tuple(mesh.axis_names) != MESH_AXES:
        raise UserError(f"mesh has the axes {', '.join(map(str, mesh.axis_names))}; expected {expected}")
    if any(kind != AxisType.Auto for kind in mesh.axis_types):
        raise UserError(
            f"mesh has axes of the types {', '.join(str(kind.name) for kind in mesh.axis_types)}, not Auto; expected {expected}"
        )


def check_same_devices(model: Any, branch: Any) -> None:
    """Raises UserError where a branch was put on other devices than the model."""
    here = {device.id for leaf in jax.tree.leaves(model) for device in leaf.sharding.device_set}
    for leaf in jax.tree.leaves(branch):
        if isinstance(leaf, jax.Array) and leaf.committed and (there := {device.id for device in leaf.sharding.device_set}) != here:
            raise UserError(f"the exit branch lies on the devices {sorted(there)}; expected {sorted(here)}, the devices of the model")
