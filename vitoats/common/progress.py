"""How long work tells what it is doing: the caller's to show or to ignore."""

from collections.abc import Callable

Progress = Callable[[str, int, int, str], None]  # stage, steps done, steps in all, what is being done


def silent(_stage: str, _done: int, _total: int, _what: str) -> None:
    """Shows nothing."""
