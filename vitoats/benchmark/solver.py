"""The exact OATS solver, with a full SVD each step, against the fast one, on the same matrices; early stop is off."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from vitoats.benchmark.matrices import Matrix
from vitoats.benchmark.timing import Progress
from vitoats.methods.oats import OATSConfig, Solver, oats

REPEATS: dict[Solver, int] = {"exact": 1, "fast": 3}  # runs, of which the median counts; an exact one is long enough for one


@dataclass(frozen=True)
class SolverTimes:
    """Both solvers on one matrix, or on several together.

    Attributes:
        name: of the matrix.
        exact_seconds, fast_seconds: that they took.
        exact_objective, fast_objective: that they reached (``Decomposition.objective``).
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
        """By how much of itself the objective of the exact solver is exceeded."""
        return self.fast_objective / self.exact_objective - 1


def compare_solvers(
    matrices: Sequence[Matrix],
    compression: float,
    rank_ratio: float,
    iterations: int,
    seed: int,
    progress: Progress = lambda *_: None,
) -> list[SolverTimes]:
    """Runs both solvers on each matrix.

    Args:
        matrices: with diagonals of second moments at least.
        compression: share of the weights to remove.
        rank_ratio: share of the kept ones for the low-rank term.
        iterations: alternating steps, all of which are taken.
        seed: of the fast solver.
        progress: told each matrix.

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
    """The sums over all matrices."""
    return SolverTimes(
        name,
        sum(row.exact_seconds for row in rows),
        sum(row.fast_seconds for row in rows),
        sum(row.exact_objective for row in rows),
        sum(row.fast_objective for row in rows),
    )
