"""The layer solvers: what all have in common, and those that look at magnitudes, norms and outputs only."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.problems import PATTERNS, config_for, layer, output_error
from vitoats.common.errors import InputError
from vitoats.methods.magnitude import MagnitudeConfig, magnitude
from vitoats.methods.oats import OATSConfig, oats
from vitoats.methods.registry import METHODS
from vitoats.methods.sparsegpt import SparseGPTConfig, sparsegpt
from vitoats.methods.sparsity import Pattern
from vitoats.methods.statistics import InputStatistics
from vitoats.methods.svd import SVDConfig, svd
from vitoats.methods.wanda import WandaConfig, wanda

SPARSE = sorted(METHODS.keys() - {"svd", "oats", "oats-h"})


# ---- what all have in common


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    name=st.sampled_from(SPARSE),
    pattern=st.sampled_from(PATTERNS),
    d_out=st.integers(3, 12),
    d_in=st.sampled_from([8, 16, 24]),
    compression=st.floats(0.1, 0.8),
)
def test_the_budget_and_the_pattern_hold(seed, name, pattern, d_out, d_in, compression):
    weight, X = layer(seed, d_out, d_in)
    config = config_for(name, pattern, compression)
    result = METHODS[name].solve(weight, InputStatistics.of(X), config)
    parsed, kept = Pattern.parse(pattern), config.budget(d_out, d_in).kept_per_group
    mask = result.S != 0
    assert result.U.shape == (d_out, 0)
    assert result.V.shape == (0, d_in)
    groups = parsed.groups(mask.contiguous())
    if name == "sparsegpt" or pattern != "layer":
        assert (groups.sum(dim=1) == kept).all()
    assert mask.sum() == kept * len(groups)
    if parsed.kind == "block":
        assert torch.equal(parsed.spread(parsed.units(mask) > 0), mask)


@pytest.mark.parametrize("name", sorted(METHODS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_reported_error_is_that_of_the_output(name, dtype):
    """Where H is known it is ||X (W - W')^T||_F over ||X W^T||_F; else that of uncorrelated inputs."""
    weight, X = layer(1, 12, 16, dtype)
    statistics = InputStatistics.of(X)
    if METHODS[name].needs == "diagonal":
        X = statistics.second_moment.sqrt().diag() * 16**0.5  # 16 tokens with the same second moments and no correlation
        statistics = InputStatistics(statistics.second_moment)
    result = METHODS[name].solve(weight, statistics, METHODS[name].config(compression=0.6))
    assert result.S.dtype == result.U.dtype == result.V.dtype == dtype
    expected = output_error(weight, X, result)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-9
    assert result.objective == pytest.approx(expected, rel=tolerance)
    total = (weight.double() @ X.T).square().sum().item() / len(X)
    assert result.relative_error == pytest.approx((expected / total) ** 0.5, rel=tolerance)
    assert 0.01 < result.relative_error < 1


@pytest.mark.parametrize("name", sorted(METHODS))
def test_dead_inputs_and_zero_weights_stay_finite(name):
    weight, X = layer(2, 12, 16)
    X[:, [0, 5]] = 0
    weight[3] = 0
    result = METHODS[name].solve(weight, InputStatistics.of(X), METHODS[name].config())
    whole = result.S + result.U @ result.V
    assert torch.isfinite(whole).all()
    assert not whole[3].abs().max() > 1e-12
    if METHODS[name].needs == "full" and name != "dsnot":
        assert whole[:, [0, 5]].abs().max() < 1e-12


@pytest.mark.parametrize("name", sorted(METHODS))
@pytest.mark.parametrize("broken", ["weight", "input"])
def test_numbers_that_are_not_finite_are_refused(name, broken):
    weight, X = layer(2, 12, 16)
    (weight if broken == "weight" else X)[1, 2] = float("nan")
    with pytest.raises(InputError, match="not finite"):
        METHODS[name].solve(weight, InputStatistics.of(X), METHODS[name].config())


@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize(("pattern", "unit"), [("1x4", 4), ("2:4", 4), ("3:8", 8), ("1x2", 2)])
def test_a_width_that_the_pattern_does_not_tile_is_refused(name, pattern, unit):
    weight, X = layer(2, 6, 9)
    with pytest.raises(InputError, match=f"multiple of {unit}, not 9: use `pattern='row'`"):
        METHODS[name].solve(weight, InputStatistics.of(X), config_for(name, pattern))


@pytest.mark.parametrize("name", SPARSE)
def test_n_of_m_contradicting_the_compression_is_refused_without_speaking_of_ranks(name):
    with pytest.raises(InputError, match="leave `compression` out") as caught:
        METHODS[name].config(compression=0.4, pattern="2:4")
    assert "rank" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "options", "remedy"),
    [
        ("sparsegpt", {"damping": -0.1}, "damping=0.01"),
        ("sparsegpt", {"damping": float("nan")}, "damping=0.01"),
        ("sparsegpt", {"block_size": 0}, "block_size=128"),
        ("sparsegpt", {"block_size": 6, "pattern": "1x4"}, "multiple of 4"),
        ("sparsegpt", {"pattern": "1:3", "compression": None}, "multiple of 3"),  # 128 columns cut through a group
        ("svd", {"damping": -1.0}, "damping"),
        ("svd", {"compression": 1.0}, "`compression`"),
        ("mrp", {"mask_choice": "X"}, "mask_choice=M"),
        ("mrp", {"mask_choice": "M"}, "`pattern='2:4'`"),
        ("mrp", {"mask_choice": "M", "pattern": "8:16", "compression": None}, "`pattern='2:4'`"),
        ("mrp", {"schedule": "never"}, "schedule=oneshot"),
        ("dsnot", {"initial": "sparsegpt"}, "initial=wanda"),
        ("dsnot", {"iterations": 0}, "`iterations`"),
        ("dsnot", {"power": -1.0}, "`power`"),
        ("alps", {"iterations": 0}, "`iterations`"),
        ("alps", {"refit_iterations": -1}, "0 or more"),
    ],
)
def test_settings_out_of_range_are_refused(name, options, remedy):
    with pytest.raises(InputError, match=remedy):
        METHODS[name].config(**options)


def test_a_singular_second_moment_without_damping_says_what_helps():
    weight, X = layer(0, 4, 8)
    X[:, 1] = X[:, 0]
    statistics = InputStatistics.of(X.round())
    with pytest.raises(InputError, match="raise `damping`"):
        sparsegpt(weight, statistics, SparseGPTConfig(damping=0.0))
    assert np.isfinite(sparsegpt(weight, statistics, SparseGPTConfig()).objective)


# ---- magnitude and Wanda


def test_magnitude_keeps_the_largest_whatever_the_inputs():
    weight, X = layer(0, 10, 16)
    result = magnitude(weight, InputStatistics.of(X), MagnitudeConfig(compression=0.75))
    threshold = weight.abs().flatten().sort(descending=True).values[39]
    assert torch.equal(result.S, torch.where(weight.abs() >= threshold, weight, 0))


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6), pattern=st.sampled_from(PATTERNS))
def test_oats_at_rank_ratio_0_is_wanda(seed, pattern):
    weight, X = layer(seed, 8, 16)
    compression = None if ":" in pattern else 0.6
    ours = wanda(weight, InputStatistics.of(X), WandaConfig(compression=compression, pattern=pattern))
    theirs = oats(weight, InputStatistics.of(X), OATSConfig(compression=compression, rank_ratio=0.0, pattern=pattern))
    assert torch.equal(ours.S != 0, theirs.S != 0)
    assert torch.allclose(ours.S, theirs.S, rtol=1e-13)


def test_wanda_scores_by_norms_of_inputs():
    weight, X = layer(3, 6, 8)
    result = wanda(weight, InputStatistics.of(X), WandaConfig(compression=0.5))
    score = weight.abs() * X.norm(dim=0)
    for row, kept in zip(score, result.S != 0, strict=True):
        assert set(row.topk(4).indices.tolist()) == set(kept.nonzero().flatten().tolist())


# ---- the activation-weighted SVD


def test_svd_is_the_best_low_rank_output():
    """No rank-r matrix comes nearer to X W^T: the truncated SVD of the outputs themselves is the bound, and it is met."""
    weight, X = layer(11, 20, 12)
    result = svd(weight, InputStatistics.of(X), SVDConfig(compression=0.4, damping=0.0))
    rank = int(0.6 * 20 * 12 / 32)
    assert result.U.shape == (20, rank)
    assert not result.S.any()
    sigma = torch.linalg.svdvals(X @ weight.T)
    assert output_error(weight, X, result) * len(X) == pytest.approx(sigma[rank:].square().sum().item(), rel=1e-9)
    asked, unit = 0.6 * 20 * 12, 32
    assert asked - unit < result.U.numel() + result.V.numel() <= asked


def test_svd_that_leaves_no_rank_is_refused():
    with pytest.raises(InputError, match="lower `compression`"):
        SVDConfig(compression=0.95).budget(12, 12)


@pytest.mark.parametrize("name", sorted(METHODS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("weights", "inputs"), [(2.0**-66, 1.0), (2.0**-100, 1.0), (1.0, 2.0**-66), (2.0**-66, 2.0**-60), (2.0**66, 2.0**30)]
)
def test_scaled_weights_and_inputs_give_the_same_result_scaled(name, dtype, weights, inputs):
    """Powers of two change no digit, and the squares of all but ordinary numbers do not fit into float32."""
    W, X = layer(3, 12, 16, dtype)
    config = METHODS[name].config(compression=0.5, **({"threshold": 0.0} if name == "dsnot" else {}))
    known = InputStatistics.of(X), InputStatistics.of(X * inputs)
    if METHODS[name].needs == "diagonal":
        known = tuple(statistics.diagonal() for statistics in known)
    plain = METHODS[name].solve(W, known[0], config)
    scaled = METHODS[name].solve(W * weights, known[1], config)
    whole, expected = scaled.S + scaled.U @ scaled.V, (plain.S + plain.U @ plain.V) * weights
    assert torch.allclose(whole / weights, expected / weights, rtol=1e-5, atol=1e-7)
    assert scaled.relative_error == pytest.approx(plain.relative_error, rel=1e-5)
