"""OATS against an independent restatement in NumPy float64, its special cases, and the fast solver against the exact one."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitoats.common.errors import InputError
from vitoats.methods.oats import OATSConfig
from vitoats.methods.oats import oats as solve
from vitoats.methods.sparsity import Pattern
from vitoats.methods.statistics import InputStatistics


def oats(weight, second_moment, config):
    return solve(weight, InputStatistics(second_moment), config)


def oats_restated(W, second_moment, rank, per_row, iterations):
    """The published loop in float64: full SVD of what S leaves, then the smallest of each row dropped by a stable sort."""
    D = np.sqrt(second_moment)
    A = W * D
    S = np.zeros_like(A)
    for _ in range(iterations):
        U, sigma, Vt = np.linalg.svd(A - S, full_matrices=False)
        L = (U[:, :rank] * sigma[:rank]) @ Vt[:rank]
        S = A - L
        for i in range(len(S)):
            S[i, np.argsort(np.abs(S[i]), kind="stable")[: S.shape[1] - per_row]] = 0
    return S / D, L / D, ((A - S - L) ** 2).sum()


def layer(seed: int, d_out: int, d_in: int, dtype=torch.float64):
    """A weight with a low-rank part and outliers, and second moments that differ by two orders of magnitude."""
    random = np.random.default_rng(seed)
    W = random.standard_normal((d_out, d_in)) + random.standard_normal((d_out, 3)) @ random.standard_normal((3, d_in))
    W[random.random(W.shape) < 0.02] *= 8
    return torch.from_numpy(W).to(dtype), torch.from_numpy(np.exp(random.standard_normal(d_in) * 1.2))


def objective(weight, moment, result) -> float:
    error = (weight - result.S - result.U @ result.V) * moment.to(weight.dtype).sqrt()
    return error.double().square().sum().item()


@pytest.mark.parametrize(
    ("d_out", "d_in", "compression", "rank_ratio", "iterations"),
    [(24, 32, 0.5, 0.2, 80), (48, 16, 0.4, 0.25, 80), (20, 60, 0.6, 0.3, 30), (16, 16, 0.3, 0.2, 1)],
)
def test_exact_solver_is_the_published_loop(d_out, d_in, compression, rank_ratio, iterations):
    weight, moment = layer(d_out, d_out, d_in)
    config = OATSConfig(compression=compression, rank_ratio=rank_ratio, iterations=iterations, solver="exact")
    budget = config.budget(d_out, d_in)
    result = oats(weight, moment, config)
    S, L, expected = oats_restated(weight.numpy(), moment.numpy(), budget.rank, budget.kept_per_group, iterations)
    assert torch.allclose(result.S, torch.from_numpy(S), rtol=1e-8, atol=1e-10)
    assert torch.allclose(result.U @ result.V, torch.from_numpy(L), rtol=1e-8, atol=1e-10)
    assert result.objective == pytest.approx(expected, rel=1e-9)
    assert result.steps == iterations
    # singular values are on U; V has orthonormal rows before unscaling
    rows = result.V * moment.sqrt()
    gram = rows @ rows.T
    assert torch.allclose(gram, torch.eye(budget.rank, dtype=gram.dtype) * gram[0, 0], atol=1e-8 * gram[0, 0].item())


@settings(deadline=None, max_examples=20)
@given(
    seed=st.integers(0, 10**6),
    pattern=st.sampled_from(["row", "layer", "2:4"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_exact_objective_never_rises(seed, pattern, dtype):
    weight, moment = layer(seed, 20, 24, dtype)
    compression = None if pattern == "2:4" else 0.5
    objectives = [
        oats(weight, moment, OATSConfig(compression=compression, iterations=n, pattern=pattern, solver="exact")).objective
        for n in (1, 2, 3, 5, 8, 13, 21)
    ]
    slack = 1e-5 if dtype == torch.float32 else 1e-12
    assert all(later <= earlier * (1 + slack) for earlier, later in pairwise(objectives))


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    d_out=st.integers(4, 40),
    d_in=st.sampled_from([8, 16, 24, 40]),
    compression=st.floats(0.1, 0.8),
    rank_ratio=st.floats(0, 0.9),
    pattern=st.sampled_from(["row", "layer", "2:4", "3:8", "1x2", "1x4"]),
    solver=st.sampled_from(["exact", "fast"]),
)
def test_budget_holds_for_every_solver(seed, d_out, d_in, compression, rank_ratio, pattern, solver):
    weight, moment = layer(seed, d_out, d_in)
    is_nm = ":" in pattern
    try:
        config = OATSConfig(
            compression=None if is_nm else compression, rank_ratio=rank_ratio, iterations=6, pattern=pattern, solver=solver
        )
        budget = config.budget(d_out, d_in)
    except InputError:
        return  # that budget leaves nothing or removes nothing; test_budget has these
    result = oats(weight, moment, config)
    assert result.U.shape == (d_out, budget.rank)
    assert result.V.shape == (budget.rank, d_in)
    parsed = Pattern.parse(pattern)
    groups = parsed.groups(result.S.contiguous())
    if parsed.kind == "block":  # all of a block, or none
        assert set((result.S != 0).unflatten(1, (-1, parsed.width)).sum(dim=2).unique().tolist()) <= {0, parsed.width}
    assert (groups != 0).sum(dim=1).max() <= budget.kept_per_group
    assert (groups != 0).sum() == budget.kept_per_group * len(groups)  # random weights: no entry is zero by itself
    assert result.objective == pytest.approx(objective(weight, moment, result), rel=1e-6, abs=1e-9)
    assert result.relative_error**2 == pytest.approx(
        result.objective / (weight * moment.sqrt()).square().sum().item(), rel=1e-6, abs=1e-12
    )


@pytest.mark.parametrize("pattern", ["row", "layer", "2:4"])
@pytest.mark.parametrize("seed", range(3))
def test_fast_solver_reaches_the_exact_objective(seed, pattern):
    """The problem is not convex: small matrices end a per cent or two apart, as exact runs from nearby starts do."""
    weight, moment = layer(seed, 160, 192, torch.float32)
    compression = None if pattern == "2:4" else 0.5
    reached = {
        solver: oats(
            weight, moment, OATSConfig(compression=compression, pattern=pattern, solver=solver, tolerance=0.0)
        ).objective
        for solver in ("exact", "fast")
    }
    assert reached["fast"] < 1.03 * reached["exact"]


def test_planted_decomposition_is_found():
    """A sum of a sparse and a low-rank matrix within the budget is taken apart again."""
    random = torch.Generator().manual_seed(1)
    L = torch.randn(60, 4, generator=random, dtype=torch.float64) @ torch.randn(4, 80, generator=random, dtype=torch.float64)
    S = torch.zeros(60, 80, dtype=torch.float64)
    S.scatter_(1, torch.rand(60, 80, generator=random).argsort(dim=1)[:, :8], 20.0)
    for solver in ("exact", "fast"):
        config = OATSConfig(compression=0.7, rank_ratio=0.5, iterations=80, solver=solver, tolerance=0.0)
        result = oats(L + S, torch.ones(80), config)
        assert result.relative_error < 5e-3, solver


def test_rank_ratio_0_is_wanda():
    weight, moment = layer(0, 30, 40)
    result = oats(weight, moment, OATSConfig(compression=0.6, rank_ratio=0.0))
    score = weight.abs() * moment.sqrt()
    kept = score >= score.sort(dim=1, descending=True).values[:, 15:16]  # 16 of 40 a row
    assert torch.equal(result.S != 0, kept)
    assert torch.allclose(result.S, weight * kept, rtol=1e-14)
    assert result.U.shape == (30, 0)


@pytest.mark.parametrize("solver", ["exact", "fast"])
def test_rank_ratio_1_is_the_activation_weighted_svd(solver):
    weight, moment = layer(0, 30, 40)
    result = oats(weight, moment, OATSConfig(compression=0.5, rank_ratio=1.0, solver=solver))
    rank = int(0.5 * 30 * 40 / 70)
    U, sigma, Vt = np.linalg.svd((weight * moment.sqrt()).numpy(), full_matrices=False)
    expected = torch.from_numpy((U[:, :rank] * sigma[:rank]) @ Vt[:rank]) / moment.sqrt()
    assert torch.allclose(result.U @ result.V, expected, atol=1e-10)
    assert not result.S.any()


@pytest.mark.parametrize("solver", ["exact", "fast"])
class TestInputsThatTellNothing:
    """Dead, constant and tiny inputs; every output stays finite."""

    def test_dead_channels_get_no_weights_and_cost_nothing(self, solver):
        weight, moment = layer(3, 20, 32)
        moment[[0, 7, 31]] = 0
        alive = moment > 0
        result = oats(weight, moment, OATSConfig(solver=solver))
        assert torch.isfinite(result.S).all()
        assert torch.isfinite(result.V).all()
        assert not result.S[:, ~alive].any()
        assert not result.V[:, ~alive].any()
        assert ((result.S != 0).sum(dim=1) == OATSConfig().budget(20, 32).kept_per_group).all()

    def test_all_dead_falls_back_to_plain_magnitudes(self, solver):
        weight, _ = layer(3, 20, 32)
        dead = oats(weight, torch.zeros(32), OATSConfig(solver=solver))
        plain = oats(weight, torch.ones(32), OATSConfig(solver=solver))
        assert torch.equal(dead.S, plain.S)

    def test_constant_inputs_act_like_any_others(self, solver):
        weight, _ = layer(3, 20, 32)
        result = oats(weight, torch.full((32,), 4.0), OATSConfig(solver=solver))
        plain = oats(weight, torch.ones(32), OATSConfig(solver=solver))
        assert torch.allclose(result.S, plain.S)  # D is constant, so it cancels
        assert result.objective == pytest.approx(4 * plain.objective)

    def test_zero_weights_stay_zero(self, solver):
        result = oats(torch.zeros(12, 16), torch.ones(16), OATSConfig(solver=solver))
        assert not result.S.any()
        assert torch.isfinite(result.U @ result.V).all()
        assert result.relative_error == 0

    @pytest.mark.parametrize("factor", [1e-30, 1e30])
    def test_only_ratios_between_inputs_matter(self, solver, factor):
        weight, moment = layer(3, 20, 32, torch.float32)
        result = oats(weight, moment, OATSConfig(solver=solver))
        scaled = oats(weight, moment * factor, OATSConfig(solver=solver))
        assert torch.allclose(scaled.S, result.S, rtol=1e-4, atol=1e-5)

    def test_a_single_live_channel(self, solver):
        weight, moment = layer(3, 20, 32, torch.float32)
        moment[1:] = 0
        result = oats(weight, moment, OATSConfig(solver=solver))
        assert torch.allclose((result.S + result.U @ result.V)[:, 0], weight[:, 0], atol=1e-5)


@pytest.mark.parametrize("solver", ["exact", "fast"])
def test_a_seed_gives_the_same_result(solver):
    weight, moment = layer(5, 64, 48, torch.float32)
    first, second = (oats(weight, moment, OATSConfig(solver=solver, seed=3)) for _ in range(2))
    assert torch.equal(first.S, second.S)
    assert torch.equal(first.U, second.U)
    assert torch.equal(first.V, second.V)


def test_early_stop_takes_fewer_steps_and_costs_less_than_it_says():
    weight, moment = layer(6, 96, 96, torch.float32)
    full = oats(weight, moment, OATSConfig(tolerance=0.0))
    early = oats(weight, moment, OATSConfig(tolerance=3e-3))
    assert full.steps == 80
    assert 5 < early.steps < 80
    assert early.objective < 1.1 * full.objective
    assert ((early.S != 0).sum(dim=1) == OATSConfig().budget(96, 96).kept_per_group).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(bad):
    weight, moment = layer(0, 8, 8)
    broken = weight.clone()
    broken[2, 3] = bad
    with pytest.raises(InputError, match="not finite"):
        oats(broken, moment, OATSConfig())
    broken = moment.clone()
    broken[1] = bad
    with pytest.raises(InputError, match="not finite"):
        oats(weight, broken, OATSConfig())


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        ({"compression": 1.5}, "`compression`"),
        ({"rank_ratio": 2.0}, "`rank_ratio`"),
        ({"iterations": 0}, "`iterations`"),
        ({"pattern": "4:2"}, "N:M"),
        ({"solver": "quick"}, "exact"),
        ({"tolerance": -1.0}, "`tolerance`"),
    ],
)
def test_settings_out_of_range_are_refused(settings, remedy):
    with pytest.raises(InputError, match=remedy):
        OATSConfig(**settings)
