"""SparseGPT against optimal brain surgeon restated in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.problems import layer
from vitoats.methods.hessian import damped_problem, inverse_factor
from vitoats.methods.sparsegpt import SparseGPTConfig, sparsegpt
from vitoats.methods.statistics import InputStatistics


def obs_restated(W, H, kept_of_row, groups_of):
    """Optimal brain surgeon, one column after the other, with a fresh inverse of what is left of H at each column."""
    W = W.copy()
    d_in = W.shape[1]
    mask = np.zeros(W.shape, bool)
    for i in range(d_in):
        if i % groups_of == 0:
            columns = range(i, i + groups_of)
            score = np.stack([W[:, j] ** 2 / np.linalg.inv(H[j:, j:])[0, 0] for j in columns], axis=1)
            for row in range(len(W)):
                mask[row, i + np.argsort(score[row])[groups_of - kept_of_row :]] = True
        inverse = np.linalg.inv(H[i:, i:])
        removed = np.where(mask[:, i], 0, W[:, i])
        W[:, i:] -= removed[:, None] * inverse[0] / inverse[0, 0]
    return np.where(mask, W, 0)


@pytest.mark.parametrize(("pattern", "block_size"), [("2:4", 4), ("2:4", 16), ("1:4", 8), ("3:4", 128)])
def test_sparsegpt_is_optimal_brain_surgeon_with_the_left_frozen(pattern, block_size):
    """The size of blocks only batches updates: masks of N:M are chosen at each group, and results agree to round-off."""
    weight, X = layer(4, 7, 16)
    statistics = InputStatistics.of(X)
    config = SparseGPTConfig(compression=None, pattern=pattern, block_size=block_size)
    H = statistics.H.numpy() + 0.01 * statistics.second_moment.mean().item() * np.eye(16)
    expected = obs_restated(weight.numpy(), H, int(pattern[0]), 4)
    assert torch.allclose(sparsegpt(weight, statistics, config).S, torch.from_numpy(expected), rtol=1e-9, atol=1e-11)


def test_sparsegpt_at_block_size_1_decides_on_each_column_over_all_rows():
    """One column at a time, and of each the larger half over all rows, then the naive update."""
    weight, X = layer(5, 8, 12)
    statistics = InputStatistics.of(X)
    got = sparsegpt(weight, statistics, SparseGPTConfig(compression=0.5, block_size=1)).S
    H = statistics.H.numpy() + 0.01 * statistics.second_moment.mean().item() * np.eye(12)
    W, expected = weight.numpy().copy(), np.zeros((8, 12))
    for i in range(12):
        inverse = np.linalg.inv(H[i:, i:])
        keep = np.argsort(np.abs(W[:, i]))[4:]
        expected[keep, i] = W[keep, i]
        W[:, i:] -= (W[:, i] - expected[:, i])[:, None] * inverse[0] / inverse[0, 0]
    assert torch.allclose(got, torch.from_numpy(expected), rtol=1e-9, atol=1e-11)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10**6), d_in=st.integers(2, 12))
def test_the_inverse_factor_is_the_inverses_of_what_is_left(seed, d_in):
    weight, X = layer(seed, 3, d_in)
    H = damped_problem(weight, InputStatistics.of(X), 0.01).H
    R = inverse_factor(H)
    assert not R.tril(-1).any()
    for j in range(d_in):
        inverse = torch.linalg.inv(H[j:, j:])
        assert R[j, j] ** 2 == pytest.approx(inverse[0, 0].item(), rel=1e-9)
        assert torch.allclose(R[j, j:] / R[j, j], inverse[0] / inverse[0, 0], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("block_size", [4, 6, 128])
@pytest.mark.parametrize("pattern", ["row", "layer"])
def test_blocks_of_columns_share_the_budget_without_drift(pattern, block_size):
    weight, X = layer(6, 5, 30)
    config = SparseGPTConfig(compression=0.7, pattern=pattern, block_size=block_size)
    mask = sparsegpt(weight, InputStatistics.of(X), config).S != 0
    kept = config.budget(5, 30).kept_per_group
    groups, share = (5, kept / 30) if pattern == "row" else (1, kept / 30)
    assert mask.sum() == groups * kept
    for columns in mask.split(block_size, dim=1):
        of_group = columns.sum(dim=1) if pattern == "row" else columns.sum().unsqueeze(0)
        assert ((of_group - share * columns.shape[1]).abs() <= 1).all()
