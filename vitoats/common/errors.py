"""The two errors that a command turns into one line and an exit status (``vitoats.cli.common.run``)."""


class InputError(ValueError):
    """Bad usage or bad input: the message names the problem and the remedy. Exit status 2."""


class RunError(RuntimeError):
    """Something failed while the command ran (a full disk, say); the message names the remedy. Exit status 1."""
