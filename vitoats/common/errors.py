"""The two errors that users see: what is wrong and what to do about it, on one line.

Arguments stand in backticks as Python spells them, with a value where the remedy names one: `img_size`, `allocation='uniform'`.
The command line words them as flags (``vitoats.cli.wording``): --img-size, --allocation uniform.
"""

import re

ARGUMENT = re.compile(r"`(?P<name>[a-z]\w*)(?:=(?P<value>[^`]*))?`")


class _ArgumentError(Exception):
    """An error whose message may name arguments.

    Attributes:
        field: the argument that is wrong, or that mends what is wrong; None where there is none.
    """

    def __init__(self, message: str, field: str | None = None):
        """``field`` is the first argument that the message names, unless given."""
        super().__init__(message)
        named = ARGUMENT.search(message)
        self.field = field or (named["name"] if named else None)


class InputError(_ArgumentError, ValueError):
    """Bad usage or bad input. A command ends with exit status 2."""


class RunError(_ArgumentError, RuntimeError):
    """Something failed on the way, such as a full disk. A command ends with exit status 1."""


def one_line(error: Exception, limit: int = 300) -> str:
    """An error's message on one line, cut to ``limit`` characters, without characters that a terminal would obey."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= limit else text[:limit] + "..."
