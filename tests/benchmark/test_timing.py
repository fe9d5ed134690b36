"""Calls that are timed take turns. Time is a clock of the test's own."""

import itertools
import time

import pytest

from vitoats.benchmark.timing import MOST_RUNS, median_ms


@pytest.fixture
def clock(monkeypatch):
    """Seconds; calls move it on."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_calls_take_turns(clock):
    order: list[str] = []

    def call(name: str):
        order.append(name)
        clock[0] += 1

    median_ms([lambda: call("a"), lambda: call("b")], rounds=3, turn_seconds=2)
    assert [(name, len(list(runs))) for name, runs in itertools.groupby(order)] == [("a", 3), ("b", 3)] * 3


def test_the_first_run_of_a_turn_does_not_count(clock):
    seconds = itertools.cycle([100, 1, 2, 9])

    def call():
        clock[0] += next(seconds)

    assert median_ms([call], rounds=3, turn_seconds=300) == [2000]


@pytest.mark.parametrize(("turn_seconds", "runs"), [(0, 1), (1, 1), (5, 5), (1000, MOST_RUNS)])
def test_a_turn_has_at_least_one_run_that_counts_and_a_limit(clock, turn_seconds, runs):
    calls = []

    def call():
        calls.append(None)
        clock[0] += 1

    assert median_ms([call], rounds=2, turn_seconds=turn_seconds) == [1000]
    assert len(calls) == 2 * (1 + runs)
