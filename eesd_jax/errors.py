"""The one exception for mistakes that a user can make and mend.

Commands print it as a single line and exit with code 2; every other exception is a bug of ours and keeps its traceback.
"""


class UserError(ValueError):
    """A value that the user gave cannot be used. The message names that value and what was expected, on one line."""
