"""The two errors that users see: what is wrong and what to do about it, on one line.

Messages name arguments in backticks as Python spells them, with the value if the remedy has one: `img_size`,
`allocation='uniform'`. The command line turns them into flags (``vitoats.cli.wording``): --img-size, --allocation uniform.
"""

import re

ARGUMENT = re.compile(r"`(?P<name>[a-z]\w*)(?:=(?P<value>[^`]*))?`")


class _ArgumentError(Exception):
    """An error whose message may name arguments.

    Attributes:
        field: the argument that is wrong or that solves the problem; None if no argument is concerned.
    """

    def __init__(self, message: str, field: str | None = None):
        """``field`` defaults to the first argument that the message names."""
        message = "".join(c if c.isprintable() else "?" for c in message)  # a name in a file may have anything in it
        super().__init__(message)
        named = ARGUMENT.search(message)
        self.field = field or (named["name"] if named else None)


class InputError(_ArgumentError, ValueError):
    """Bad usage or bad input. A command ends with exit status 2."""


class RunError(_ArgumentError, RuntimeError):
    """Something failed during the run, such as a full disk. A command ends with exit status 1."""


class SilentError(Exception):
    """Another process of the same run has reported why it ends. A command ends with exit status 1 and says nothing."""


def one_line(error: Exception, limit: int = 300) -> str:
    """An error's message on one line, cut to ``limit`` characters, without control characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= limit else text[:limit] + "..."
