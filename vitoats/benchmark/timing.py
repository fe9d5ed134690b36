"""Times several calls against each other; they take turns, for a fair comparison."""

import statistics
import time
from collections.abc import Callable, Sequence

MOST_RUNS = 20  # of a call in one turn: enough for a median, without long turns of fast calls


def median_ms(calls: Sequence[Callable[[], object]], rounds: int = 5, turn_seconds: float = 0.1) -> list[float]:
    """Times calls in turns, so that other load on the machine affects them equally.

    A turn starts with one untimed run, because threads of the previous call may still be spinning. Then come 1 to ``MOST_RUNS``
    timed runs.

    Args:
        calls: the functions to time.
        rounds: number of turns of each call.
        turn_seconds: approximate duration of a turn's timed runs.

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
