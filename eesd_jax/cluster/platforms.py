"""Starts the devices that JAX can use here, and ends in one line where JAX_PLATFORMS asks for others."""

import importlib.util

import jax
from jax.extend import backend

from eesd_jax.errors import UserError

# By the names that JAX_PLATFORMS takes: the extra of this package, and modules of which the extra brings one.
_EXTRAS = {
    "cuda": ("cuda", ("jax_cuda13_plugin", "jax_cuda12_plugin")),
    "gpu": ("cuda", ("jax_cuda13_plugin", "jax_cuda12_plugin")),
    "tpu": ("tpu", ("libtpu",)),
}


def start() -> None:
    """Starts JAX's devices.

    Raises:
      UserError: JAX_PLATFORMS names a platform that cannot be used here; the line says which can, and which extra is missing.
    """
    wanted = jax.config.jax_platforms
    try:
        jax.devices()
    except (AssertionError, RuntimeError) as error:  # which of the two, depends on why
        if not wanted:
            raise
        reason = "; ".join(filter(None, map(_missing, wanted.split(",")))) or " ".join(str(error).split())[:200] or "no such devices"
        raise UserError(f"JAX_PLATFORMS is {wanted!r}, which cannot be used here ({reason}); expected {_usable()}") from None


def _missing(platform: str) -> str | None:
    """Says why a platform cannot be used, as far as that can be told."""
    extra, modules = _EXTRAS.get(platform, (None, ()))
    if extra is None:
        return None
    if not any(importlib.util.find_spec(module) for module in modules):
        return f'the extra {extra!r} is not installed: pip install -e ".[{extra}]"'
    return f"the extra {extra!r} is installed, but it finds no device or no driver"


def _usable() -> str:
    """Finds what JAX would choose by itself, and restores its state afterwards."""
    backend.clear_backends()
    wanted = jax.config.jax_platforms
    jax.config.update("jax_platforms", None)
    try:
        found = {device.platform for device in jax.devices()} | {"cpu"}
    finally:
        jax.config.update("jax_platforms", wanted)
        backend.clear_backends()
    return f"{' or '.join(sorted(found, reverse=True))}, or JAX_PLATFORMS unset"
