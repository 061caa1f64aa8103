"""Early-exiting speculative decoding with Thompson-sampling control, in JAX."""

import functools
import importlib
import os
from typing import TYPE_CHECKING, Any

from eesd_jax.config import DecodeConfig, SamplingConfig
from eesd_jax.errors import UserError
from eesd_jax.model.config import ModelConfig

if TYPE_CHECKING:
    from eesd_jax.decode.controllers import Controller
    from eesd_jax.engine.engine import Engine, load
    from eesd_jax.engine.generation import Generation

__version__ = "0.1.0"
__all__ = ["Controller", "DecodeConfig", "Engine", "Generation", "ModelConfig", "SamplingConfig", "UserError", "load"]

# Loaded when first asked for: JAX and transformers take seconds, which a command with a mistake in its flags should not.
_LAZY = {
    "Controller": "eesd_jax.decode.controllers",
    "Engine": "eesd_jax.engine.engine",
    "load": "eesd_jax.engine.engine",
    "Generation": "eesd_jax.engine.generation",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@functools.cache
def load_kernels(platform: str) -> None:
    """Imports the kernels for a platform, which register themselves in `model/ops.py`; where there are none, all runs in plain JAX.

    Nothing else imports them. So only programs for a CPU load LLVM, and the package works without its folder `kernels/`.
    """
    # Of this package's own folder: what an editable installation knows of another copy does not count.
    if os.path.isfile(os.path.join(__path__[0], "kernels", platform, "__init__.py")):
        importlib.import_module(f"{__name__}.kernels.{platform}")
