"""The exact OATS solver against the fast one: objectives of the same steps, and their sums."""

import pytest
import torch

from vitoats.benchmark.matrices import Matrix
from vitoats.benchmark.solver import SolverTimes, compare_solvers, together
from vitoats.common.errors import InputError
from vitoats.methods.oats import OATSConfig, oats
from vitoats.methods.statistics import InputStatistics


@pytest.fixture
def matrices():
    X = torch.randn(100, 48)
    return [Matrix(name, torch.randn(32, 48), InputStatistics(X.double().square().mean(dim=0))) for name in ("a", "b")]


def test_both_solvers_take_all_steps_to_the_objective_of_their_method(matrices):
    rows = compare_solvers(matrices, 0.5, 0.2, iterations=6, seed=0)
    assert [row.name for row in rows] == ["a", "b"]
    for row, matrix in zip(rows, matrices, strict=True):
        for solver, objective in (("exact", row.exact_objective), ("fast", row.fast_objective)):
            config = OATSConfig(compression=0.5, rank_ratio=0.2, iterations=6, tolerance=0.0, solver=solver, seed=0)
            found = oats(matrix.weight, matrix.inputs, config)
            assert found.steps == 6
            assert objective == found.objective
        assert abs(row.objective_gap) < 0.05


def test_sums_compare_the_whole():
    rows = [SolverTimes("a", 3.0, 1.0, 2.0, 2.0), SolverTimes("b", 5.0, 1.0, 2.0, 3.0)]
    total = together(rows)
    assert (total.name, total.exact_seconds, total.fast_seconds) == ("all", 8.0, 2.0)
    assert total.speedup == 4
    assert total.objective_gap == pytest.approx(0.25)


def test_settings_that_are_out_of_range_are_refused(matrices):
    with pytest.raises(InputError, match="compression"):
        compare_solvers(matrices, 1.5, 0.2, iterations=2, seed=0)
