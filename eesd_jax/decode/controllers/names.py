"""From a controller's name, as users write it, to the controller. A name is checked without importing JAX."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import pathlib
import re
import sys
from typing import Any, NamedTuple

from eesd_jax.decode.controllers.fixed import Fixed
from eesd_jax.decode.controllers.protocol import REGISTRY, USAGES, Controller, Setup
from eesd_jax.errors import UserError

PLAIN = "plain"  # no speculation
AUTO = "auto"  # the default controller where something drafts, else plain


class ControllerSpec(NamedTuple):
    """A controller's name taken apart: `fixed:3` is kind "fixed" and value 3; value is None where the kind says all."""

    kind: str
    value: Any = None

    @property
    def controller(self) -> type[Controller]:
        """The class; not of `plain`, which has none."""
        return REGISTRY.get(self.kind) or _class_of_file(*self.kind.rsplit(":", 1))


def known_names() -> str:
    """Lists all names, as messages and --help show them."""
    return ", ".join([PLAIN, *USAGES, "FILE.py:CLASS"])


def parse_controller(name: str, max_draft: int) -> ControllerSpec:
    """Takes a controller's name apart.

    Raises:
      UserError: an unknown name, a value out of range, a file without such a class.
    """
    if name == PLAIN:
        return ControllerSpec(PLAIN)
    of_file = re.fullmatch(r"(.+\.py:\w+)(?::(.*))?", name)
    kind, value = of_file.groups() if of_file else re.fullmatch(r"([^:]*)(?::(.*))?", name, re.DOTALL).groups()
    unknown = UserError(f"controller {name!r} is unknown; expected one of {known_names()}")
    if kind not in REGISTRY and not of_file:
        raise unknown
    spec = ControllerSpec(kind)
    try:
        return spec._replace(value=spec.controller.parse(value, max_draft))
    except UserError:
        raise
    except ValueError as error:
        raise (UserError(f"controller {name!r} {error}") if str(error) else unknown) from None


def build_controller(spec: ControllerSpec, setup: Setup) -> Controller | None:
    """Makes the controller of a spec, with the bandit before it where lookup drafts too; None for plain decoding."""
    return None if spec.kind == PLAIN else with_sources(spec.controller.build(spec.value, setup), setup)


def with_sources(controller: Controller, setup: Setup) -> Controller:
    """Puts the bandit before a controller that knows nothing of lookup, where lookup drafts too."""
    if controller.chooses_source or not setup.has_lookup:
        return controller
    from eesd_jax.decode.sources.bandit import Arms  # and JAX with it

    return Arms.over(controller, setup)


def needs_costs(controller: type[Controller] | Controller, *, has_branch: bool, has_lookup: bool) -> bool:
    """Whether such a controller is built from measured costs; so is the bandit's choice between two sources."""
    chooses = has_branch and has_lookup and not (controller.chooses_source or isinstance(controller, Fixed) or controller is Fixed)
    return controller.needs_costs or chooses


def _class_of_file(path: str, name: str) -> type[Controller]:
    file = pathlib.Path(path).expanduser().resolve()
    try:
        found = getattr(_module_of_file(file), name, None)
    except OSError as error:
        raise UserError(f"controller {f'{path}:{name}'!r}: cannot read {path!r} ({error.strerror})") from None
    except Exception as error:  # whatever the file does when it is imported
        raise UserError(f"controller {f'{path}:{name}'!r}: {path!r} cannot be imported ({type(error).__name__}: {error})") from None
    if not (isinstance(found, type) and issubclass(found, Controller)):
        raise UserError(f"controller {f'{path}:{name}'!r} is not in that file; expected a class derived from eesd_jax.Controller")
    return found


@functools.cache  # one class, however often its name is read: another one would be compiled again
def _module_of_file(file: pathlib.Path) -> Any:
    name = f"eesd_jax_controller_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, file)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
