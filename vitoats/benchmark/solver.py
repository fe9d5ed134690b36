"""Compares the exact OATS solver (a full SVD in each step) with the fast one on the same matrices, without early stopping."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from vitoats.benchmark.matrices import Matrix
from vitoats.common.progress import StageProgress
from vitoats.methods.oats import OATSConfig, Solver, oats

REPEATS: dict[Solver, int] = {"exact": 1, "fast": 3}  # the median counts; one exact run is long enough


@dataclass(frozen=True)
class SolverTimes:
    """Both solvers on one matrix, or on several together.

    Attributes:
        name: name of the matrix.
        exact_seconds, fast_seconds: time that each solver took.
        exact_objective, fast_objective: objective that each solver reached (``Decomposition.objective``).
    """

    name: str
    exact_seconds: float
    fast_seconds: float
    exact_objective: float
    fast_objective: float

    @property
    def speedup(self) -> float:
        return self.exact_seconds / self.fast_seconds

    @property
    def objective_gap(self) -> float:
        """The fast objective relative to the exact one, minus 1."""
        return self.fast_objective / self.exact_objective - 1


def compare_solvers(
    matrices: Sequence[Matrix],
    compression: float,
    rank_ratio: float,
    iterations: int,
    seed: int,
    progress: StageProgress = lambda *_: None,
) -> list[SolverTimes]:
    """Runs both solvers on each matrix.

    Args:
        matrices: matrices with at least the diagonals of second moments.
        compression: share of the weights to remove.
        rank_ratio: share of the kept weights for the low-rank term.
        iterations: number of alternating steps; all are done.
        seed: seed of the fast solver.
        progress: called before each matrix.

    Raises:
        InputError: a setting is out of range.
    """

    def run(solver: Solver, matrix: Matrix) -> tuple[float, float]:
        """Median seconds and the objective."""
        config = OATSConfig(
            compression=compression, rank_ratio=rank_ratio, seed=seed, iterations=iterations, tolerance=0.0, solver=solver
        )
        seconds = []
        for _ in range(REPEATS[solver]):
            start = time.perf_counter()
            objective = oats(matrix.weight, matrix.inputs, config).objective
            seconds.append(time.perf_counter() - start)
        return statistics.median(seconds), objective

    rows = []
    for done, matrix in enumerate(matrices):
        progress(done, len(matrices), matrix.name)
        (exact_seconds, exact), (fast_seconds, fast) = run("exact", matrix), run("fast", matrix)
        rows.append(SolverTimes(matrix.name, exact_seconds, fast_seconds, exact, fast))
    return rows


def together(rows: Sequence[SolverTimes], name: str = "all") -> SolverTimes:
    """Sums over all matrices."""
    return SolverTimes(
        name,
        sum(row.exact_seconds for row in rows),
        sum(row.fast_seconds for row in rows),
        sum(row.exact_objective for row in rows),
        sum(row.fast_objective for row in rows),
    )
