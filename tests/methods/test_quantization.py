"""Rounding to int8: coordinate descent against a restatement weight by weight in float64, and the error that is left."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.problems import layer, random_mask
from vitoats.common.errors import InputError
from vitoats.format.decomposition import Decomposition
from vitoats.format.int8 import dequantized, round_rows, rounded_factors
from vitoats.methods.oats_h import OATSHConfig, oats_h
from vitoats.methods.quantization import SWEEPS, coordinate_descent, quantized
from vitoats.methods.registry import measured
from vitoats.methods.statistics import InputStatistics


def descent_by_hand(S, target, H, kept, steps):
    """Weight by weight, row by row, from S rounded to nearest."""
    levels = (S / steps[:, None]).round().clamp(-127, 127)
    for row in range(len(S)):
        for _ in range(SWEEPS):
            for j in range(S.shape[1]):
                if not kept[row, j]:
                    continue
                others = target[row] - levels[row] * steps[row]
                others[j] = target[row, j]
                best = (others @ H[:, j]) / H[j, j]  # the weight j that is best, given the others
                levels[row, j] = (best / steps[row]).round().clamp(-127, 127)
    return levels


def problem(seed, d_out=5, d_in=150):
    """S on a support, its target, A and scale with a condition that is not small, and coarse steps."""
    target, X = layer(seed, d_out, d_in)
    statistics = InputStatistics.of(X)
    kept = random_mask(seed, target.shape, equal=False)
    return torch.where(kept, target, 0), target, statistics, kept, torch.full((d_out,), 0.2, dtype=torch.float64)


@pytest.mark.parametrize("seed", range(4))
def test_coordinate_descent_by_hand(seed):
    S, target, statistics, kept, steps = problem(seed)  # more columns than are rounded in one go
    scale = statistics.full.diagonal().sqrt()
    A = statistics.full / scale / scale[:, None]
    found = coordinate_descent(S, target, A, scale, kept, steps)
    assert torch.equal(found, descent_by_hand(S, target, statistics.full, kept, steps).to(torch.int8))
    assert not found[~kept].any()


def error_of(S, target, statistics) -> float:
    E = (target - S).double()
    return ((E @ statistics.full) * E).sum().item()


@given(seed=st.integers(0, 1000), d_out=st.integers(2, 6), d_in=st.integers(1, 40))
def test_coordinate_descent_is_never_worse_than_rounding_to_nearest(seed, d_out, d_in):
    S, target, statistics, kept, steps = problem(seed, d_out, d_in)
    scale = statistics.full.diagonal().sqrt()
    found = coordinate_descent(S, target, statistics.full / scale / scale[:, None], scale, kept, steps)
    nearest = (S / steps[:, None]).round().clamp(-127, 127) * steps[:, None]
    limit = error_of(nearest, target, statistics)
    assert error_of(found * steps[:, None], target, statistics) <= limit * (1 + 1e-9)


def solved(seed=0, d_out=48, d_in=64, compression=0.5):
    weight, X = layer(seed, d_out, d_in, torch.float32)
    statistics = InputStatistics.of(X)
    return weight, statistics, oats_h(weight, statistics, OATSHConfig(compression=compression, iterations=30))


@pytest.mark.parametrize("seed", range(3))
def test_rounding_costs_little_and_less_than_rounding_to_nearest(seed):
    weight, statistics, found = solved(seed)
    result = quantized(weight, statistics, found)
    nearest = [dequantized(*term) for term in (round_rows(found.S), *rounded_factors(found.U, found.V))]
    of_nearest = measured(weight, statistics, *nearest)
    assert result.error.objective < of_nearest.objective
    assert result.error.relative_error < 1.003 * found.relative_error
    assert not result.S[0][found.S == 0].any()


def test_the_error_is_that_of_the_rounded_weights():
    weight, statistics, found = solved()
    result = quantized(weight, statistics, found)
    S, U, V = (q.double() * scale.double()[:, None] for q, scale in (result.S, result.U, result.V))
    E = weight.double() - S - U @ V
    assert result.error.objective == pytest.approx(((E @ statistics.full) * E).sum().item(), rel=1e-4)
    assert torch.allclose(result.error.S.double() + result.error.U.double() @ result.error.V.double(), S + U @ V, atol=1e-6)


def test_the_refit_takes_up_the_error_of_the_low_rank_term():
    """With a low-rank term that was spoilt, S is refitted to what is left of W."""
    weight, statistics, found = solved()
    spoilt = measured(weight, statistics, found.S, 0.5 * found.U, found.V)
    assert quantized(weight, statistics, spoilt).error.objective < 0.9 * spoilt.objective


def test_where_only_the_diagonal_is_known_s_is_rounded_to_nearest():
    weight, X = layer(3, 8, 20, torch.float32)
    kept = random_mask(3, weight.shape, equal=True)
    statistics = InputStatistics(X.square().mean(dim=0))
    S = torch.where(kept, weight, 0)
    result = quantized(weight, statistics, measured(weight, statistics, S))
    assert all(torch.equal(a, b) for a, b in zip(result.S, round_rows(S), strict=True))


def test_rows_of_zeros_and_rows_of_one_value():
    weight, X = layer(1, 4, 16, torch.float32)
    S = weight.clone()
    S[1], S[2, 1:] = 0, 0
    weight[3] = S[3] = 0.25
    statistics = InputStatistics.of(X)
    result = quantized(weight, statistics, measured(weight, statistics, S))
    levels, scale = result.S
    assert not levels[1].any()
    assert scale[1] == 1
    assert levels[2].nonzero().flatten().tolist() == [0]
    assert levels[3].tolist() == [127] * 16
    assert scale[3] * 127 == pytest.approx(0.25)


def test_inputs_that_were_always_zero():
    weight, X = layer(2, 6, 12, torch.float32)
    X[:, 3] = 0
    statistics = InputStatistics.of(X)
    result = quantized(weight, statistics, measured(weight, statistics, weight))
    assert torch.allclose(result.error.S[:, 3], weight[:, 3], atol=0.02)


def test_the_empty_low_rank_term_and_the_empty_sparse_term():
    weight, X = layer(2, 6, 12, torch.float32)
    statistics = InputStatistics.of(X)
    assert quantized(weight, statistics, measured(weight, statistics, weight)).U[0].shape == (6, 0)
    U, singular, V = torch.linalg.svd(weight, full_matrices=False)
    low_rank = measured(weight, statistics, torch.zeros_like(weight), U[:, :3] * singular[:3], V[:3])
    result = quantized(weight, statistics, low_rank)
    assert not result.S[0].any()
    assert result.error.relative_error < 1.01 * low_rank.relative_error


@pytest.mark.parametrize("where", ["weight", "S", "V"])
def test_weights_that_are_not_finite_are_refused(where):
    weight, statistics, found = solved(d_out=16, d_in=24)
    broken = {"weight": weight, "S": found.S, "V": found.V}
    broken[where][0, 0] = float("nan")
    decomposition = Decomposition(broken["S"], found.U, broken["V"], 0.0, 0.0, 1)
    with pytest.raises(InputError, match="not finite"):
        quantized(weight, statistics, decomposition)
