"""JAX, imported when a controller first computes something: a command that only checks the name of one should not wait for it.

Stands in for `lazy import` of Python 3.15.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jax
    import jax.numpy as jnp
else:

    class _Lazy:
        """A module that is imported when something of it is asked for."""

        def __init__(self, name: str):
            self.__name__ = name

        def __getattr__(self, attribute: str) -> Any:
            value = getattr(importlib.import_module(self.__name__), attribute)
            setattr(self, attribute, value)  # found at once from now on
            return value

    jax, jnp = _Lazy("jax"), _Lazy("jax.numpy")

__all__ = ["jax", "jnp"]
