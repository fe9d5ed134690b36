"""OATS-H and its ADMM: known special cases, brute force on small problems, and the rivals that it has to beat."""

from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitoats.common.errors import InputError
from vitoats.methods.admm import PENALTIES, LowRank, admm, conjugate_gradients
from vitoats.methods.alps import ALPSConfig, alps
from vitoats.methods.oats import OATSConfig, oats
from vitoats.methods.oats_h import OATSHConfig, oats_h
from vitoats.methods.sparsegpt import SparseGPTConfig, sparsegpt
from vitoats.methods.sparsity import Pattern
from vitoats.methods.statistics import InputStatistics


def layer(seed: int, d_out: int, d_in: int):
    """Weights [d_out, d_in] and statistics of inputs that correlate and differ in scale."""
    random = np.random.default_rng(seed)
    mix = random.standard_normal((d_in, d_in)) / d_in**0.5 + 0.7 * np.eye(d_in)
    X = random.standard_normal((8 * d_in, d_in)) @ mix * np.exp(0.5 * random.standard_normal(d_in))
    return torch.from_numpy(random.standard_normal((d_out, d_in))), InputStatistics.of(torch.from_numpy(X))


def uncorrelated(d_in: int, seed: int = 0) -> InputStatistics:
    moments = torch.from_numpy(np.exp(np.random.default_rng(seed).standard_normal(d_in)))
    return InputStatistics(moments, moments.diag(), torch.zeros(d_in, dtype=torch.float64))


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    pattern=st.sampled_from(["row", "layer", "1x2", "1x4", "2:4", "5:8"]),
    solver=st.sampled_from(["admm", "support"]),
    d_out=st.integers(8, 24),
    d_in=st.sampled_from([16, 24, 32]),
    compression=st.floats(0.2, 0.8),
    rank_ratio=st.floats(0.0, 0.35),
)
def test_the_budget_and_the_pattern_hold(seed, pattern, solver, d_out, d_in, compression, rank_ratio):
    weight, statistics = layer(seed, d_out, d_in)
    compression = None if ":" in pattern else compression
    config = OATSHConfig(compression=compression, rank_ratio=rank_ratio, pattern=pattern, solver=solver, iterations=12)
    result = oats_h(weight, statistics, config)
    budget, parsed = config.budget(d_out, d_in), Pattern.parse(pattern)
    assert result.U.shape == (d_out, budget.rank)
    assert result.V.shape == (budget.rank, d_in)
    mask = result.S != 0
    assert (parsed.groups(mask.contiguous()).sum(dim=1) == budget.kept_per_group).all()
    if parsed.kind == "block":
        assert torch.equal(parsed.spread(parsed.units(mask) > 0), mask)


def test_the_low_rank_term_alone_is_the_best_in_the_metric_of_the_inputs():
    weight, statistics = layer(0, 24, 32)
    low_rank = LowRank(statistics.full, 24, rank=5, seed=0)
    low_rank.fit(weight, steps=200)
    root = torch.linalg.cholesky(statistics.full)
    singular = torch.linalg.svdvals(weight @ root)
    error = (low_rank.removed_from(weight) @ root).square().sum()
    assert error.item() == pytest.approx(singular[5:].square().sum().item(), rel=1e-6)


def test_a_step_of_the_low_rank_term_never_raises_its_error():
    weight, statistics = layer(3, 24, 32)
    root = torch.linalg.cholesky(statistics.full)
    low_rank = LowRank(statistics.full, 24, rank=5, seed=0)
    errors = []
    for _ in range(10):
        low_rank.fit(weight)
        errors.append((low_rank.removed_from(weight) @ root).square().sum().item())
    assert all(b <= a * (1 + 1e-9) for a, b in pairwise(errors))


@pytest.mark.parametrize("pattern", ["layer", "row", "2:4"])
def test_without_a_low_rank_term_and_with_its_penalty_it_is_alps(pattern):
    """The anchor: same problem, same iterations, same refit; float32 against float64."""
    compression = None if ":" in pattern else 0.6
    for seed in range(3):
        weight, statistics = layer(seed, 24, 32)
        config = OATSHConfig(
            compression=compression,
            pattern=pattern,
            rank_ratio=0.0,
            penalty="alps",
            iterations=300,
            refit_rounds=1,
            refit_iterations=10,
            damping=0.0,
        )
        ours = oats_h(weight, statistics, config)
        theirs = alps(weight, statistics, ALPSConfig(compression=compression, pattern=pattern, damping=0.0))
        assert ((ours.S != 0) == (theirs.S != 0)).double().mean() > 0.99
        assert ours.objective == pytest.approx(theirs.objective, rel=0.01)


@pytest.mark.parametrize("compression", [0.4, 0.6])
def test_where_inputs_do_not_correlate_the_objective_is_that_of_oats(compression):
    weight, _ = layer(1, 40, 32)
    statistics = uncorrelated(32)
    common = {"compression": compression, "rank_ratio": 0.25, "pattern": "row"}
    result = oats_h(weight, statistics, OATSHConfig(damping=0.0, **common))
    D = statistics.second_moment.sqrt()
    assert result.objective == pytest.approx((((weight - result.S - result.U @ result.V) * D) ** 2).sum().item(), rel=1e-5)
    reference = oats(weight, statistics, OATSConfig(solver="exact", **common))
    assert result.objective < 1.08 * reference.objective  # another local optimum of the same problem
    kept = result.S != 0  # what is kept is not changed: S is the residual of the low-rank term there
    assert torch.allclose(result.S[kept], (weight - result.U @ result.V)[kept], atol=1e-3)


def test_with_correlated_inputs_it_beats_oats_and_sparsegpt():
    ours, support, diagonal, columns = 0.0, 0.0, 0.0, 0.0
    for seed in range(4):
        weight, statistics = layer(seed, 48, 64)
        common = {"compression": 0.6, "rank_ratio": 0.25}
        ours += oats_h(weight, statistics, OATSHConfig(**common)).objective
        support += oats_h(weight, statistics, OATSHConfig(solver="support", **common)).objective
        E = oats(weight, InputStatistics(statistics.second_moment), OATSConfig(**common))
        lost = weight - E.S - E.U @ E.V
        diagonal += ((lost @ statistics.full) * lost).sum().item()
        columns += sparsegpt(weight, statistics, SparseGPTConfig(compression=0.6)).objective
    assert ours < support < diagonal
    assert ours < columns


class ExactLowRank(LowRank):
    """Takes so many steps each time that only round-off is left."""

    def fit(self, R, steps=1):
        super().fit(R, 400)


def restated(W, A, penalty, kept, rank):
    """ADMM of the module's docstring, with an inverse and an SVD in each iteration; float64."""
    root = torch.linalg.cholesky(A)

    def best(R):
        U = torch.linalg.svd(R @ root).U[:, :rank]
        return U @ U.T @ R

    def largest(M):
        return M.abs() >= M.abs().flatten().sort(descending=True).values[kept - 1]

    L = best(W) if penalty.short else torch.zeros_like(W)
    D = torch.where(largest(W - L), W - L, 0)
    V, rho, support = torch.zeros_like(W), penalty.first, D != 0
    for step in range(1, 301):
        B = ((W - L) @ A - V + rho * D) @ torch.linalg.inv(A + rho * torch.eye(len(A)))
        D = torch.where(largest(B + V / rho), B + V / rho, 0)
        V = V + rho * (B - D)
        L = best(W - (D if penalty.short else B))
        if step % 3 == 0:
            moved, support = ((D != 0) != support).sum().item(), D != 0
            if moved == 0 or (step >= 30 and moved < penalty.settled * kept):
                break
            rho *= next(factor for share, factor in penalty.growth if moved >= share * kept)
    return B, best(W - D), step


@pytest.mark.parametrize("name", ["slow", "fast"])
@pytest.mark.parametrize("shape", [(24, 32), (48, 16)])
def test_admm_is_its_formulas(name, shape):
    weight, statistics = layer(7, *shape)
    A = statistics.full / statistics.second_moment.sqrt() / statistics.second_moment.sqrt()[:, None] + 0.01 * torch.eye(
        shape[1]
    )
    kept, rank = shape[0] * shape[1] // 3, 3
    pattern, low_rank = Pattern.parse("layer"), ExactLowRank(A, shape[0], rank, seed=0)
    B, steps = admm(weight, A, torch.linalg.eigh(A), lambda m: pattern.keep(m, kept), PENALTIES[name], 300, low_rank)
    expected, L, expected_steps = restated(weight, A, PENALTIES[name], kept, rank)
    assert steps == expected_steps
    assert torch.allclose(B, expected, atol=1e-6)
    assert torch.allclose(low_rank.U @ low_rank.V, L, atol=1e-6)


def test_the_default_schedule_is_better_than_the_fast_one():
    errors = dict.fromkeys(("slow", "fast"), 0.0)
    for seed in range(3):
        weight, statistics = layer(seed, 64, 64)
        for name in errors:
            errors[name] += oats_h(weight, statistics, OATSHConfig(compression=0.5, penalty=name)).objective
    assert errors["slow"] < 0.97 * errors["fast"]


def test_near_the_best_of_all_masks():
    """One row of 8 inputs of which 4 are kept: all 70 masks, each with its exact weights."""
    found, best, columns = 0.0, 0.0, 0.0
    for seed in range(20):
        weight, statistics = layer(seed, 1, 8)
        H, w = statistics.full, weight[0]
        config = OATSHConfig(compression=0.5, rank_ratio=0.0, damping=0.0, refit_iterations=30)
        found += oats_h(weight, statistics, config).objective
        columns += sparsegpt(weight, statistics, SparseGPTConfig(compression=0.5, damping=0.0)).objective
        costs = []
        for removed in combinations(range(8), 4):
            P = list(removed)
            inverse = torch.linalg.inv(torch.linalg.inv(H)[P][:, P])
            costs.append((w[P] @ inverse @ w[P]).item())
        best += min(costs)
    assert best <= found < 1.5 * best
    assert found < 0.7 * columns


def test_the_refit_reaches_the_exact_weights_on_the_support():
    weight, statistics = layer(5, 12, 16)
    A = statistics.correlation.A.double() + 0.01 * torch.eye(16)
    mask = torch.rand(12, 16) < 0.5
    S = conjugate_gradients(torch.zeros_like(weight), weight, A, mask, 40)
    gradient = torch.where(mask, (weight - S) @ A, 0)
    assert gradient.abs().max() < 1e-8
    assert not S[~mask].any()


def test_support_keeps_the_support_of_oats():
    weight, statistics = layer(2, 24, 32)
    config = OATSHConfig(compression=0.5, rank_ratio=0.25, pattern="row", solver="support", damping=0.0, iterations=40)
    plain = oats(
        weight.float(),
        InputStatistics(statistics.second_moment),
        OATSConfig(compression=0.5, rank_ratio=0.25, pattern="row", iterations=40),
    )
    refitted = oats_h(weight, statistics, config)
    assert ((refitted.S != 0) == (plain.S != 0)).double().mean() > 0.99


def test_a_constant_input_and_zero_weights_stay_finite():
    weight, _ = layer(4, 12, 16)
    X = torch.randn(100, 16, dtype=torch.float64)
    X[:, 3], X[:, 5] = 0.0, 2.0
    weight[2] = 0
    result = oats_h(weight, InputStatistics.of(X).centred(), OATSHConfig())
    whole = result.S + result.U @ result.V
    assert torch.isfinite(whole).all()
    assert not whole[2].abs().max() > 1e-6


def test_centred_moments_are_those_about_the_mean():
    X = torch.randn(50, 6, dtype=torch.float64) + torch.arange(6)
    centred = InputStatistics.of(X).centred()
    expected = torch.cov(X.T, correction=0)
    assert torch.allclose(centred.full, expected)
    assert torch.allclose(centred.second_moment, expected.diagonal())
    with pytest.raises(InputError, match="mean of the inputs"):
        InputStatistics(torch.ones(3)).centred()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"iterations": 0}, "`iterations`"),
        ({"solver": "exact"}, "admm or support"),
        ({"penalty": "none"}, "alps, slow, fast"),
        ({"refit_rounds": 0}, "1 or more"),
        ({"damping": -1.0}, "damping"),
        ({"compression": 1.0}, "`compression`"),
    ],
)
def test_settings_that_cannot_be_are_refused(options, said):
    with pytest.raises(InputError, match=said):
        OATSHConfig(**options)
