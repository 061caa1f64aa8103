"""The one exception for mistakes that a user can make and mend, and checks that raise it.

Commands print it as a single line and exit with code 2; every other exception is a bug of ours and keeps its traceback.
"""

import operator
from typing import Any


class UserError(ValueError):
    """A value that the user gave cannot be used. The message names that value and what was expected, on one line."""


def shown(value: Any, limit: int = 80) -> str:
    """Shows a value in a message: on one line, and cut where it is long."""
    # A long text or list is cut before it is written out as well: it may be megabytes.
    text = repr(value[: limit * 4]) if isinstance(value, str | bytes | list | tuple) else " ".join(repr(value).split())
    return text if len(text) <= limit else f"{text[:limit]}..."


def integer(value: Any, what: str, expected: str = "an integer", *, least: int | None = None, most: int | None = None) -> int:
    """Takes an integer of any type (numpy's, too) as a Python one.

    Args:
      what: the name of the value, `expected` what would have been right, for the message.
      least, most: the range, both included.

    Raises:
      UserError: the value is a text, a truth value, a float, or anything else that is no integer, or lies outside the range.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or (least is not None and number < least) or (most is not None and number > most):
        raise UserError(f"{what} is {shown(value if number is None else number)}; expected {expected}")
    return number
