"""Processes that work at once: they begin together, the slowest counts, and a failure is reported. Never how long it took."""

import pytest

from vitoats.benchmark.busy import compare_busy, seconds_at_once
from vitoats.common.errors import RunError

SLEEPS = "import os, time; from vitoats.benchmark.busy import work_when_told; work_when_told(lambda: time.sleep({}))"
MEETS = """
import os, sys, time
from vitoats.benchmark.busy import work_when_told
folder = sys.argv[1]
def work():
    open(os.path.join(folder, str(os.getpid())), "w").close()
    while len(os.listdir(folder)) < 3:
        time.sleep(0.01)
work_when_told(work)
"""


def test_all_processes_work_at_the_same_time(tmp_path):
    assert seconds_at_once(["-c", MEETS, str(tmp_path)], 3) > 0  # each waits until all three work
    assert len(list(tmp_path.iterdir())) == 3


def test_the_ratio_is_that_of_the_times():
    times = compare_busy(["-c", SLEEPS.format(0.2)], processes=2, rounds=1)
    assert times.alone_seconds >= 0.2
    assert times.ratio == pytest.approx(times.together_seconds / times.alone_seconds, abs=0.02)


def test_a_process_that_fails_ends_the_benchmark():
    with pytest.raises(RunError, match="no such file"):
        seconds_at_once(["-c", "raise SystemExit('no such file')"], 2)
