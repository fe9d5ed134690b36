"""Times work in one process alone, and in several processes at once, which share the cores of a busy machine."""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from vitoats.common.errors import RunError

READY = "ready\n"  # what a process prints once it has prepared its work


@dataclass(frozen=True)
class BusyTimes:
    """Some work alone, and the same work in several processes at once.

    Attributes:
        alone_seconds: the time of one process that works alone.
        together_seconds: the time until the last of the processes is done.
        ratio: the second over the first: as many as there are processes, if one alone already keeps all cores busy.
    """

    alone_seconds: float
    together_seconds: float
    ratio: float


def compare_busy(argv: Sequence[str], processes: int, rounds: int) -> BusyTimes:
    """Times one process and several in turns.

    Args:
        argv: arguments of Python for a process that calls ``work_when_told``.
        processes: how many work at once.
        rounds: turns of each; their medians count.

    Raises:
        RunError: a process fails.
    """
    alone, together = [], []
    for _ in range(rounds):
        alone.append(seconds_at_once(argv, 1))
        together.append(seconds_at_once(argv, processes))
    one, last = statistics.median(alone), statistics.median(together)
    return BusyTimes(round(one, 3), round(last, 3), round(last / one, 2))


def seconds_at_once(argv: Sequence[str], processes: int) -> float:
    """The seconds that the slowest of several processes takes; they begin together, once all are prepared.

    Raises:
        RunError: a process fails.
    """
    pipe = subprocess.PIPE
    with ExitStack() as stack:
        started = []
        for _ in range(processes):
            process = subprocess.Popen([sys.executable, *argv], stdin=pipe, stdout=pipe, stderr=pipe, text=True)
            stack.enter_context(process)
            stack.callback(process.kill)
            started.append(process)
        for process in started:
            assert process.stdout
            if process.stdout.readline() != READY:
                raise RunError(f"a process of the benchmark failed: {_last_line(process.communicate()[1])}")
        for process in started:
            assert process.stdin
            process.stdin.write("\n")
            process.stdin.flush()
        seconds = []
        for process in started:
            output, complaint = process.communicate()
            if process.returncode:
                raise RunError(f"a process of the benchmark failed: {_last_line(complaint)}")
            seconds.append(float(output.splitlines()[-1]))
    return max(seconds)


def _last_line(complaint: str) -> str:
    return (complaint.strip() or "it was killed").splitlines()[-1]


def work_when_told(work: Callable[[], object]) -> None:
    """In a process that ``seconds_at_once`` started: waits for the others, works, and prints the seconds that it took."""
    print(READY, end="", flush=True)
    sys.stdin.readline()
    start = time.perf_counter()
    work()
    print(time.perf_counter() - start, flush=True)
