"""DSNoT against its published loop, restated."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.problems import PATTERNS, config_for, layer, uncorrelated
from vitoats.methods.dsnot import DSNoTConfig, dsnot
from vitoats.methods.magnitude import MagnitudeConfig, magnitude
from vitoats.methods.statistics import InputStatistics
from vitoats.methods.wanda import WandaConfig, wanda


def dsnot_restated(W, mean, second, kept, cycles, threshold, m=0):
    """Row by row with plain loops: grow what lowers |e| most for its variance, then remove the least score that fits."""
    variance, score = second - mean**2, np.abs(W) * np.sqrt(second)
    masks = np.zeros(W.shape, bool)
    for row, w in enumerate(W):
        d = w * mean
        groups = np.arange(len(w)) // (m or len(w))
        mask = masks[row]
        for g in np.unique(groups):
            members = np.flatnonzero(groups == g)
            mask[members[np.argsort(score[row, members])[len(members) - kept :]]] = True
        can_grow, can_go = set(np.flatnonzero(~mask)), set(np.flatnonzero(mask))
        e = d[~mask].sum()
        for _ in range(cycles):
            if abs(e) <= threshold or not can_grow:
                break
            grown = max(can_grow, key=lambda j: np.sign(e) * d[j] / variance[j])
            after = e - d[grown]
            fits = [j for j in can_go if (groups[j] == groups[grown] if m else d[j] * after < 0)]
            if not fits:
                break
            gone = min(fits, key=lambda j: score[row, j])
            if m and np.sign(after + d[gone]) != np.sign(e):
                break
            mask[grown], mask[gone] = True, False
            can_grow.remove(grown)
            can_go.remove(gone)
            e = after + d[gone]
    return masks


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6), pattern=st.sampled_from(["row", "2:4", "5:8"]), cycles=st.integers(1, 60))
def test_dsnot_is_the_published_loop(seed, pattern, cycles):
    weight, X = layer(seed, 6, 16)
    statistics = InputStatistics.of(X)
    result = dsnot(weight, statistics, config_for("dsnot", pattern, iterations=cycles, threshold=0.05))
    n, m = (8, 0) if pattern == "row" else map(int, pattern.split(":"))
    mean, second = statistics.mean.numpy(), statistics.second_moment.numpy()
    expected = dsnot_restated(weight.numpy(), mean, second, n, cycles, 0.05, m)
    assert np.array_equal((result.S != 0).numpy(), expected)
    assert torch.equal(result.S[result.S != 0], weight[result.S != 0])  # only the mask changes


@pytest.mark.parametrize("pattern", PATTERNS)
def test_dsnot_brings_the_mean_error_down_and_keeps_the_counts(pattern):
    weight, X = layer(12, 40, 64)
    statistics = InputStatistics.of(X)
    first = wanda(weight, statistics, config_for("wanda", pattern)).S
    result = dsnot(weight, statistics, config_for("dsnot", pattern))
    assert torch.equal((result.S != 0).sum(dim=1), (first != 0).sum(dim=1))
    before, after = (((weight - S) @ statistics.mean).abs().sum().item() for S in (first, result.S))
    assert after < 0.8 * before
    assert result.steps <= 50


@pytest.mark.parametrize("pattern", ["row", "1x2", "2:4"])
def test_dsnot_bears_constant_inputs(pattern):
    weight, X = layer(12, 20, 16)
    X[:, :6] = torch.tensor([3.0, -3.0, 1.0, 0.0, 2.0, 1e-200])
    config = config_for("dsnot", pattern, iterations=10)
    S = dsnot(weight, InputStatistics.of(X), config).S
    assert torch.isfinite(S).all()
    first = wanda(weight, InputStatistics.of(X), config_for("wanda", pattern)).S
    assert torch.equal((S != 0).sum(dim=1), (first != 0).sum(dim=1))
    assert not torch.equal(S, first)


def test_dsnot_without_means_is_its_first_mask():
    weight, _ = layer(13, 10, 16)
    for initial, first in (("wanda", WandaConfig()), ("magnitude", MagnitudeConfig(pattern="row"))):
        solve = wanda if initial == "wanda" else magnitude
        result = dsnot(weight, uncorrelated(16), DSNoTConfig(initial=initial))
        assert torch.equal(result.S, solve(weight, uncorrelated(16), first).S)
        assert result.steps == 0
