"""The errors of several methods on single matrices, solvers only: the same inputs from the dense model, the same budget.

The error is ||X (W - W')^T||_F^2 / ||X W^T||_F^2 over all calibration tokens, in float64, no matter which statistics of X a
method uses. Allocation, reconstruction targets and refitted biases, which a whole compression may add, are left out.
"""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

import vitoats.methods  # noqa: F401  (fills the table of methods)
from vitoats.benchmark.matrices import Matrix
from vitoats.common.progress import StageProgress
from vitoats.methods.registry import get_method, output_energy
from vitoats.methods.statistics import InputStatistics


@dataclass(frozen=True)
class LayerError:
    """The result of a method on a matrix.

    Attributes:
        layer: name of the matrix.
        method: name of the method.
        error: relative squared error of the outputs.
        seconds: time that the solver took.
    """

    layer: str
    method: str
    error: float
    seconds: float


def configs_of(methods: Sequence[str], compression: float, rank_ratio: float, seed: int) -> dict[str, Any]:
    """Each method's config with this budget, without the settings that the method does not have.

    Raises:
        InputError: a method is unknown, or a setting is out of range.
    """
    settings = {"compression": compression, "rank_ratio": rank_ratio, "seed": seed}
    configs = {}
    for name in methods:
        config = get_method(name).config
        known = {field.name for field in dataclasses.fields(config)}
        configs[name] = config(**{key: value for key, value in settings.items() if key in known})
    return configs


def compare_methods(
    matrices: Sequence[Matrix], configs: Mapping[str, Any], progress: StageProgress = lambda *_: None
) -> list[LayerError]:
    """Compresses each matrix with each method.

    Args:
        matrices: matrices with full second moments.
        configs: config of each method, by name.
        progress: called before each matrix.

    Returns:
        rows, ordered by matrix, then method.
    """
    rows = []
    for done, matrix in enumerate(matrices):
        progress(done, len(matrices), matrix.name)
        for name, config in configs.items():
            method = get_method(name)
            known = matrix.inputs if method.needs == "full" else InputStatistics(matrix.inputs.second_moment)
            start = time.perf_counter()
            found = method.solve(matrix.weight, known, config)
            seconds = time.perf_counter() - start
            error = layer_error(matrix.weight, found.S + found.U @ found.V, matrix.inputs)
            rows.append(LayerError(matrix.name, name, error, round(seconds, 2)))
    return rows


def layer_error(weight: Tensor, approximation: Tensor, inputs: InputStatistics) -> float:
    """||X (W - W')^T||_F^2 / ||X W^T||_F^2 from H, in float64."""
    return output_energy((weight - approximation).double(), inputs) / output_energy(weight.double(), inputs)


def geometric_means(rows: Sequence[LayerError]) -> dict[str, float]:
    """The geometric mean of the errors of each method."""
    errors: dict[str, list[float]] = {}
    for row in rows:
        errors.setdefault(row.method, []).append(row.error)
    return {method: float(np.exp(np.log(np.array(of)).mean())) for method, of in errors.items()}
