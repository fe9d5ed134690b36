"""The share-out of work over processes, alone and in real processes that torchrun starts."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.several import finished, torchrun
from vitoats.common import ranks

SHARED = """
import json, os, sys
import torch
from vitoats.common import ranks

with ranks.joined():
    rank = ranks.rank()
    x = torch.arange(6.0).view(3, 2) + rank
    ranks.add_up([x])
    tasks, costs, made = list(range(5)), [1.0, 9.0, 2.0, 2.0, 5.0], []
    def work(task):
        made.append(task)
        return torch.full((2,), float(task)), {"task": task}
    results = list(ranks.shared_out(tasks, costs, work, lambda r: ({"x": r[0]}, r[1]), lambda t, v: (t["x"].tolist(), v)))
    rows = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
    product = ranks.row_by_row(lambda a: a @ torch.ones(3, 2), rows, work=ranks.WORTH_SHARING)
    found = {
        "sum": x.tolist(), "total": ranks.total(rank + 1), "most": ranks.maximum(torch.tensor([rank, -rank])).tolist(),
        "first": ranks.from_first(lambda: {"rank": rank}), "results": results,
        "rows": torch.allclose(product, rows @ torch.ones(3, 2)),
    }
    sums = torch.tensor([float(len(made))])
    ranks.add_up([sums])
    found["made"] = sums.item()
    with open(os.path.join(sys.argv[1], f"{rank}.json"), "w") as file:
        json.dump(found, file)
"""
FAILS = """
import sys
from vitoats.cli.common import run
from vitoats.common import ranks
from vitoats.common.errors import InputError

def main(argv):
    with ranks.joined():
        if argv[0] == "all" or ranks.rank() == int(argv[0]):
            raise InputError("this is wrong: mend it")
        ranks.wait_for_all()
    return {}

sys.exit(run(main))
"""
EMPTY = """
import torch
from vitoats.common import ranks

with ranks.joined():
    assert ranks.total(1) == 6
"""


def script(tmp_path, text):
    path = tmp_path / "script.py"
    path.write_text(text)
    return path


def test_alone_everything_is_as_it_was_given():
    x = torch.randn(3, 2)
    ranks.add_up([x])
    assert ranks.maximum(x) is x
    assert ranks.of_first(x) is x
    assert (ranks.rank(), ranks.size(), ranks.total(7), ranks.share(7)) == (0, 1, 7, 7)
    assert ranks.from_first(lambda: 3) == 3
    assert list(ranks.shared_out([1, 2], [1, 1], lambda task: -task, None, None)) == [-1, -2]
    with ranks.joined():
        ranks.wait_for_all()


@given(st.lists(st.floats(0, 1e18), max_size=40), st.integers(1, 9))
def test_no_worker_has_more_than_the_bound_of_longest_first(costs, n):
    """The makespan is at most 4/3 of the optimum, which is at least the mean and the longest task."""
    owners = ranks.longest_first(costs, n)
    loads = [sum(c for c, owner in zip(costs, owners, strict=True) if owner == worker) for worker in range(n)]
    assert all(0 <= owner < n for owner in owners)
    assert max(loads) <= sum(costs) / n + max(costs, default=0) * (1 - 1 / n) + 1e-9 * sum(costs)


def test_three_processes_add_up_share_out_and_agree(tmp_path):
    finished(torchrun(3, script(tmp_path, SHARED), tmp_path, cache=tmp_path))
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    assert found[0] == found[1] == found[2]
    assert found[0]["sum"] == [[3 * i + 3, 3 * i + 6] for i in (0, 2, 4)]
    assert (found[0]["total"], found[0]["most"], found[0]["first"]) == (6, [2, 0], {"rank": 0})
    assert found[0]["results"] == [[[float(i)] * 2, {"task": i}] for i in range(5)]
    assert found[0]["made"] == 5
    assert found[0]["rows"]


@pytest.mark.slow
@pytest.mark.parametrize("who", ["all", "0", "1"])
def test_an_error_is_reported_once(tmp_path, who):
    """Whether all processes have it or one alone."""
    _, stderr = finished(torchrun(2, script(tmp_path, FAILS), who, "--quiet", cache=tmp_path), status=1)
    lines = [line for line in stderr.splitlines() if line.startswith("error:")]
    assert lines == ["error: this is wrong: mend it"]


@pytest.mark.slow
def test_no_process_aborts_at_its_end(tmp_path):
    """Without an end of the process group, gloo's threads ended some runs in "terminate called without an active exception"."""
    path = script(tmp_path, EMPTY)
    for _ in range(4):
        assert "terminate called" not in finished(torchrun(6, path, cache=tmp_path))[1]
