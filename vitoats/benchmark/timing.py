"""Timing several calls against each other, fairly: they take turns."""

import statistics
import time
from collections.abc import Callable, Sequence

Progress = Callable[[int, int, str], None]  # told what is done, of how much, and what comes next

MOST_RUNS = 20  # of a call in one turn: enough for a median, and a fast call does not make the others wait


def median_ms(calls: Sequence[Callable[[], object]], rounds: int = 5, turn_seconds: float = 0.1) -> list[float]:
    """Times calls in turns, so that whatever else the machine does hits them alike.

    A turn starts with one run that does not count: threads of the call before may still be spinning for work then. 1 to
    ``MOST_RUNS`` runs that count follow.

    Args:
        calls: what to time.
        rounds: how often each call has a turn.
        turn_seconds: about how long the runs of a turn that count take together.

    Returns:
        the median milliseconds of each call.
    """
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, row in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            runs = min(max(turn_seconds / (time.perf_counter() - start), 1), MOST_RUNS)
            for _ in range(round(runs)):
                start = time.perf_counter()
                call()
                row.append(time.perf_counter() - start)
    return [1000 * statistics.median(row) for row in times]
