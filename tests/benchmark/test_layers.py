"""What matrices lose by several methods: the errors are those of the outputs, for methods that know H and such that do not."""

import math

import pytest
import torch

from vitoats.benchmark.layers import LayerError, compare_methods, configs_of, geometric_means, layer_error
from vitoats.benchmark.matrices import Matrix
from vitoats.common.errors import InputError
from vitoats.methods.registry import get_method
from vitoats.methods.statistics import InputStatistics


@pytest.fixture
def tokens():
    return torch.randn(200, 12) @ torch.randn(12, 12)


def test_the_error_is_that_of_the_outputs(tokens):
    W, near = torch.randn(5, 12), torch.randn(5, 12)
    expected = (tokens.double() @ (W - near).double().T).norm() ** 2 / (tokens.double() @ W.double().T).norm() ** 2
    assert layer_error(W, near, InputStatistics.of(tokens)) == pytest.approx(expected.item(), rel=1e-9)


def test_each_matrix_is_solved_by_each_method(tokens):
    matrices = [Matrix(name, torch.randn(8, 12), InputStatistics.of(tokens)) for name in ("first", "second")]
    configs = configs_of(["magnitude", "wanda", "alps"], 0.5, 0.25, 0)
    said: list[str] = []
    rows = compare_methods(matrices, configs, lambda _done, _total, what: said.append(what))
    assert [(row.layer, row.method) for row in rows] == [(m.name, method) for m in matrices for method in configs]
    assert said == ["first", "second"]
    for row in rows:
        matrix = next(m for m in matrices if m.name == row.layer)
        found = get_method(row.method).solve(matrix.weight, matrix.inputs, configs[row.method])
        expected = layer_error(matrix.weight, found.S + found.U @ found.V, matrix.inputs)
        assert row.error == pytest.approx(expected, rel=1e-6)
    error = {(row.layer, row.method): row.error for row in rows}
    assert all(error[m.name, "alps"] < error[m.name, "magnitude"] for m in matrices)


def test_configs_have_the_settings_that_their_methods_know():
    configs = configs_of(["oats", "wanda"], 0.6, 0.3, 7)
    assert (configs["oats"].compression, configs["oats"].rank_ratio, configs["oats"].seed) == (0.6, 0.3, 7)
    assert configs["wanda"].compression == 0.6
    assert not hasattr(configs["wanda"], "rank_ratio")
    with pytest.raises(InputError, match="wonder"):
        configs_of(["wonder"], 0.6, 0.3, 7)


def test_means_are_geometric_and_by_method():
    rows = [
        LayerError(layer, method, error, 0.0) for layer, method, error in (("l", "a", 0.1), ("l", "b", 0.5), ("m", "a", 0.4))
    ]
    assert geometric_means(rows) == pytest.approx({"a": math.sqrt(0.04), "b": 0.5})
