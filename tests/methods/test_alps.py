"""ALPS against refitted masks and the exact refit."""

from itertools import pairwise

import pytest
import torch

from tests.problems import layer, random_mask, uncorrelated
from vitoats.methods.alps import ALPSConfig, alps
from vitoats.methods.hessian import damped_problem, refit
from vitoats.methods.magnitude import MagnitudeConfig, magnitude
from vitoats.methods.mrp import MRPConfig, mrp
from vitoats.methods.registry import output_energy
from vitoats.methods.statistics import InputStatistics
from vitoats.methods.wanda import WandaConfig, wanda


@pytest.mark.parametrize("pattern", ["layer", "row", "2:4", "1x4"])
def test_alps_is_better_than_a_refitted_mask_of_magnitudes_or_of_sparsegpt(pattern):
    totals = dict.fromkeys(("alps", "mrp", "magnitude"), 0.0)
    for seed in range(3):
        weight, X = layer(seed, 32, 48)
        statistics = InputStatistics.of(X)
        problem = damped_problem(weight, statistics, 0.01)
        compression = None if ":" in pattern else 0.7
        mask = magnitude(weight, statistics, MagnitudeConfig(compression=compression, pattern=pattern)).S != 0
        totals["magnitude"] += output_energy(weight - refit(problem, mask), statistics)
        totals["alps"] += alps(weight, statistics, ALPSConfig(compression=compression, pattern=pattern)).objective
        totals["mrp"] += mrp(weight, statistics, MRPConfig(compression=compression, pattern=pattern)).objective
    assert totals["alps"] < 0.9 * totals["magnitude"]
    assert totals["alps"] < totals["mrp"]


def test_conjugate_gradients_reach_the_exact_refit():
    weight, X = layer(14, 10, 16)
    statistics = InputStatistics.of(X)
    mask, errors = None, []
    problem = damped_problem(weight, statistics, 0.01)
    for iterations in (0, 1, 2, 5, 40):
        S = alps(weight, statistics, ALPSConfig(refit_iterations=iterations)).S
        mask = S != 0
        errors.append((((S - weight) @ problem.H) * (S - weight)).sum().item())
    assert all(later <= earlier * (1 + 1e-9) for earlier, later in pairwise(errors))
    assert errors[1] < errors[0]
    assert torch.allclose(S, refit(problem, mask), rtol=1e-6, atol=1e-8)


def test_alps_where_inputs_do_not_correlate_changes_no_weight_that_it_keeps():
    """There is nothing to compensate; its search need not end at the best mask, which is Wanda's over the whole matrix."""
    weight, _ = layer(15, 10, 16)
    statistics = uncorrelated(16)
    result = alps(weight, statistics, ALPSConfig(damping=0.0))
    assert torch.allclose(result.S, torch.where(result.S != 0, weight, 0), rtol=1e-12)
    best = wanda(weight, statistics, WandaConfig(pattern="layer")).objective
    assert best <= result.objective * (1 + 1e-12) < 1.5 * best


@pytest.mark.parametrize("compression", [0.0, 0.5])
def test_alps_gives_up_on_a_support_that_nothing_moves(compression):
    weight, X = layer(15, 10, 16)
    weight = weight if compression == 0 else torch.zeros_like(weight)
    result = alps(weight, InputStatistics.of(X), ALPSConfig(compression=compression))
    assert torch.allclose(result.S, weight, rtol=1e-8)
    assert result.steps < 100


def test_alps_finds_a_planted_support():
    """Weights that are sparse already, plus a little noise that correlated inputs spread: the support comes back."""
    weight, X = layer(16, 24, 32)
    planted = torch.where(random_mask(16, (24, 32), True), weight + weight.sign(), 0)
    result = alps(planted + 0.01 * weight, InputStatistics.of(X), ALPSConfig())
    assert torch.equal(result.S != 0, planted != 0)
