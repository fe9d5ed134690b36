"""One layer: what a solver is given, and what its bias takes up."""

import dataclasses
import math

import pytest
import torch

import vitoats.methods  # noqa: F401  (fills the table of methods)
from tests.in_place import compress_in_place, job_of
from vitoats.calibration.targets import OutputError
from vitoats.common.errors import InputError, RunError
from vitoats.compression.layer import LayerProblem, compress_layer
from vitoats.methods.magnitude import MagnitudeConfig
from vitoats.methods.mrp import MRPConfig
from vitoats.methods.registry import get_method, measured, output_energy
from vitoats.methods.statistics import InputStatistics
from vitoats.models.adapter import adapt
from vitoats.models.blocks import LinearLayer
from vitoats.models.inputs import ImageInputs


def problem(refit_bias, parts=1):
    X = torch.randn(50, 6) + 1
    weight, bias = torch.randn(4, 6), torch.randn(4)
    return X, LayerProblem(weight, bias, (len(weight) // parts,) * parts, InputStatistics.of(X), refit_bias)


def test_the_bias_takes_up_the_mean_of_what_is_lost():
    X, given = problem(refit_bias=True)
    lost = torch.randn(4, 6)
    before = X @ given.weight.T + given.bias
    after = X @ (given.weight - lost).T + given.refitted_bias(lost)
    assert torch.allclose(before.mean(dim=0), after.mean(dim=0), atol=1e-5)


@pytest.mark.parametrize("refit_bias", [False, True])
def test_each_part_is_solved_on_what_counts_of_the_input(refit_bias):
    X, given = problem(refit_bias, parts=2)
    seen = []

    def solve(weight, moments):
        seen.append((weight, moments))
        return measured(weight, moments, weight)

    assert len(given.solve(solve)) == 2
    assert torch.equal(torch.cat([weight for weight, _ in seen]), given.weight)
    inputs = X.double() - X.double().mean(dim=0) if refit_bias else X.double()
    assert torch.allclose(seen[0][1].H, inputs.T @ inputs / 50)
    assert seen[0][1] is seen[1][1]  # so that what is computed of it is computed once


def layer_of(linear) -> LinearLayer:
    return LinearLayer(torch.nn.Sequential(linear).requires_grad_(False), "0", 1)


def test_where_nothing_is_removed_the_layer_stays_as_it_is():
    layer = layer_of(torch.nn.Linear(6, 4))
    statistics = InputStatistics.of(torch.randn(50, 6))
    compressed, row = compress_layer(layer, statistics, None, get_method("mrp"), MRPConfig(compression=0.0), refit_bias=True)
    assert torch.equal(compressed.weight, layer.module.weight)
    assert torch.allclose(compressed.bias, layer.module.bias)
    assert (row.nonzeros, row.kept_parameters, row.solver_error, row.ranks) == (24, 24, 0.0, (0,))
    assert row.relative_error < 1e-6  # the bias is rounded


def test_a_method_of_the_diagonal_is_told_no_more():
    """Magnitude's error is then the one over the diagonal, whatever was collected."""
    layer = layer_of(torch.nn.Linear(6, 4))
    statistics = InputStatistics.of(torch.randn(50, 6) @ torch.randn(6, 6))
    rows = [
        compress_layer(layer, known, None, get_method("magnitude"), MagnitudeConfig(), refit_bias=False)[1]
        for known in (statistics, InputStatistics(statistics.second_moment))
    ]
    assert rows[0].solver_error == rows[1].solver_error > 0
    assert rows[1].solver_error == rows[1].relative_error != rows[0].relative_error


@pytest.mark.parametrize("method", ["magnitude", "oats", "mrp", "oats-h"])
@pytest.mark.parametrize("corrects", [False, True])
@pytest.mark.parametrize("refit_bias", [False, True])
@pytest.mark.parametrize("int8", [False, True])
def test_the_error_of_every_method_is_that_of_the_outputs(method, corrects, refit_bias, int8):
    """Restated on the tokens: against the dense layer's own outputs, whatever the solver was asked for."""
    X = (torch.randn(200, 6) @ torch.randn(6, 6) + 2).double()
    layer = layer_of(torch.nn.Linear(6, 4))
    e = torch.randn(200, 4).double()
    error = OutputError(e.T @ X / 200, e.mean(dim=0)) if corrects else None
    found = get_method(method)
    compressed, row = compress_layer(layer, InputStatistics.of(X), error, found, found.config(), refit_bias, int8)
    dense = layer.module.weight.double()
    lost = X @ (compressed.weight.double() - dense).T + (compressed.bias - layer.module.bias).double()
    assert row.relative_error == pytest.approx((lost.norm() / (X @ dense.T).norm()).item(), rel=1e-5)
    assert row.solver_error != pytest.approx(row.relative_error, rel=1e-3) or not (corrects or refit_bias)


def test_a_refusal_names_the_layer():
    layer = layer_of(torch.nn.Linear(6, 4))
    layer.module.weight.data[0, 0] = float("nan")
    with pytest.raises(InputError, match=r"^0: "):
        compress_layer(layer, InputStatistics.of(torch.randn(9, 6)), None, get_method("mrp"), MRPConfig(), refit_bias=False)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("part", ["S", "U", "V"])
def test_a_result_that_is_not_finite_is_none(part, int8):
    """A user's own method may give anything, and an error of NaN would be reported as 0."""

    def solve(weight, statistics, _config):
        found = measured(weight, statistics, weight.clone(), torch.ones(4, 1), torch.zeros(1, 6))
        getattr(found, part)[0, 0] = float("nan")
        return found

    method = dataclasses.replace(get_method("mrp"), solve=solve)
    layer = layer_of(torch.nn.Linear(6, 4))
    with pytest.raises(RunError, match=r"^0: the result is not finite"):
        compress_layer(layer, InputStatistics.of(torch.randn(9, 6)), None, method, MRPConfig(), False, int8)


def test_an_energy_of_nan_is_not_zero():
    statistics = InputStatistics.of(torch.randn(9, 6))
    assert math.isnan(output_energy(torch.full((4, 6), float("nan"), dtype=torch.float64), statistics))
    assert math.isnan(measured(torch.randn(4, 6), statistics, torch.full((4, 6), float("nan"))).relative_error)


@pytest.mark.parametrize("images", ["one", "black", "ordinary"])
@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e-30])
@pytest.mark.parametrize("method", ["oats-h", "alps", "svd"])
def test_weights_near_zero_and_images_that_are_all_the_same_are_compressed(tiny, images, scale, method):
    """Constant inputs have a variance below round-off, and squares of inputs near zero do not fit into float32."""
    for linear in adapt(tiny, ImageInputs(32)).linears:
        linear.module.weight.data *= scale
    batch = {"one": torch.randn(1, 3, 32, 32).expand(8, -1, -1, -1), "black": torch.zeros(8, 3, 32, 32)}
    job = job_of(method, get_method(method).config(compression=0.5), target="residual", refit_bias=True)
    report = compress_in_place(tiny, batch.get(images, torch.randn(8, 3, 32, 32)), job)
    assert all(0 <= row.solver_error < 0.6 and math.isfinite(row.relative_error) for row in report.layers)
