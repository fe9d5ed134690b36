"""How long-running work reports its progress, which the caller may show or ignore."""

from collections.abc import Callable

Progress = Callable[[str, int, int, str], None]  # stage, steps done, total steps, description of the step
StageProgress = Callable[[int, int, str], None]  # the same within one stage


def silent(_stage: str, _done: int, _total: int, _what: str) -> None:
    """Ignores progress."""
