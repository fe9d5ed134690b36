"""The layer solvers against closed forms, brute force on small problems, and naive restatements in float64."""

from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vitoats.methods  # noqa: F401  (fills the table of methods)
from vitoats.errors import InputError
from vitoats.methods.alps import ALPSConfig, alps
from vitoats.methods.dsnot import DSNoTConfig, dsnot
from vitoats.methods.hessian import damped_problem, inverse_factor, refit
from vitoats.methods.magnitude import MagnitudeConfig, magnitude
from vitoats.methods.mrp import MRPConfig, joint_mask, mrp, oneshot_mask
from vitoats.methods.oats import OATSConfig, oats
from vitoats.methods.registry import METHODS, output_energy
from vitoats.methods.sparsegpt import SparseGPTConfig, sparsegpt
from vitoats.methods.sparsity import Pattern
from vitoats.methods.statistics import InputStatistics
from vitoats.methods.svd import SVDConfig, svd
from vitoats.methods.wanda import WandaConfig, wanda

SPARSE = sorted(METHODS.keys() - {"svd", "oats", "oats-h"})
PATTERNS = ["row", "layer", "1x2", "1x4", "2:4", "1:4", "5:8"]


def layer(seed: int, d_out: int, d_in: int, dtype=torch.float64):
    """Weights, and inputs that correlate, differ in scale and have means: (W [d_out, d_in], X [n, d_in])."""
    random = np.random.default_rng(seed)
    mix = random.standard_normal((d_in, d_in)) / d_in**0.5 + 0.7 * np.eye(d_in)
    X = random.standard_normal((8 * d_in, d_in)) @ mix * np.exp(0.5 * random.standard_normal(d_in)) + random.random(d_in)
    return torch.from_numpy(random.standard_normal((d_out, d_in))).to(dtype), torch.from_numpy(X)


def uncorrelated(d_in: int, seed: int = 0) -> InputStatistics:
    """Inputs of mean 0 that do not correlate: H is diagonal."""
    moments = torch.from_numpy(np.exp(np.random.default_rng(seed).standard_normal(d_in)))
    return InputStatistics(moments, moments.diag(), torch.zeros(d_in, dtype=torch.float64))


def config_for(name: str, pattern: str, compression: float = 0.5, **options):
    return METHODS[name].config(compression=None if ":" in pattern else compression, pattern=pattern, **options)


def output_error(weight, X, result) -> float:
    return ((weight - result.S - result.U @ result.V).double() @ X.T).square().sum().item() / len(X)


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
    with pytest.raises(InputError, match=f"multiple of {unit}, not 9: use --pattern row"):
        METHODS[name].solve(weight, InputStatistics.of(X), config_for(name, pattern))


@pytest.mark.parametrize("name", SPARSE)
def test_n_of_m_contradicting_the_compression_is_refused_without_speaking_of_ranks(name):
    with pytest.raises(InputError, match="leave --compression out") as caught:
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
        ("svd", {"compression": 1.0}, "--compression"),
        ("mrp", {"mask_choice": "X"}, "mask_choice=M"),
        ("mrp", {"mask_choice": "M"}, "--pattern 2:4"),
        ("mrp", {"mask_choice": "M", "pattern": "8:16", "compression": None}, "--pattern 2:4"),
        ("mrp", {"schedule": "never"}, "schedule=oneshot"),
        ("dsnot", {"initial": "sparsegpt"}, "initial=wanda"),
        ("dsnot", {"iterations": 0}, "--iterations"),
        ("dsnot", {"power": -1.0}, "--method-options"),
        ("alps", {"iterations": 0}, "--iterations"),
        ("alps", {"refit_iterations": -1}, "0 or more"),
    ],
)
def test_settings_out_of_range_are_refused(name, options, remedy):
    with pytest.raises(InputError, match=remedy):
        METHODS[name].config(**options)


def test_a_singular_second_moment_without_damping_names_the_damping():
    weight, X = layer(0, 4, 8)
    X[:, 1] = X[:, 0]
    statistics = InputStatistics.of(X.round())
    with pytest.raises(InputError, match=r"damping=0\.01"):
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


# ---- SparseGPT


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


# ---- the joint refit, and MRP


def random_mask(seed, shape, equal: bool):
    random = np.random.default_rng(seed)
    if equal:
        return torch.from_numpy(random.permuted(np.arange(shape[0] * shape[1]).reshape(shape) % 2 == 0, axis=1))
    mask = torch.from_numpy(random.random(shape) < random.random((shape[0], 1)))
    mask[0], mask[1] = False, True  # a row that keeps nothing, and one that keeps all
    return mask


@pytest.mark.parametrize("equal", [True, False], ids=["equal rows", "unequal rows"])
@pytest.mark.parametrize("memory", [1, 10**9])
@pytest.mark.parametrize("seed", range(3))
def test_the_refit_is_least_squares_on_the_kept_columns(monkeypatch, equal, memory, seed):
    """Against NumPy's lstsq on the tokens themselves, one row at a time or all together."""
    monkeypatch.setattr("vitoats.methods.hessian.REFIT_BYTES", memory)
    weight, X = layer(seed, 8, 12)
    mask = random_mask(seed, (8, 12), equal)
    got = refit(damped_problem(weight, InputStatistics.of(X), 0.0), mask)
    for row in range(8):
        kept = mask[row].numpy()
        expected = np.zeros(12)
        expected[kept] = np.linalg.lstsq(X.numpy()[:, kept], X.numpy() @ weight[row].numpy(), rcond=None)[0]
        np.testing.assert_allclose(got[row].numpy(), expected, rtol=1e-8, atol=1e-10)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6), damping=st.sampled_from([0.0, 0.01, 0.5]))
def test_the_refit_is_the_multiple_removal_update_and_costs_what_it_says(seed, damping):
    weight, X = layer(seed, 4, 10)
    problem = damped_problem(weight, InputStatistics.of(X), damping)
    mask = random_mask(seed, (4, 10), True)
    inverse = torch.linalg.inv(problem.H)
    fitted = refit(problem, mask)
    for w, new, kept in zip(weight, fitted, mask, strict=True):
        P = (~kept).nonzero().flatten()
        multiplier = torch.linalg.solve(inverse[P][:, P], w[P])
        assert torch.allclose(new, torch.where(kept, w - inverse[:, P] @ multiplier, 0), rtol=1e-7, atol=1e-9)
        assert (new - w) @ problem.H @ (new - w) == pytest.approx((w[P] @ multiplier).item(), rel=1e-8)


def test_removing_one_by_one_ends_at_the_joint_refit():
    """Exact sequential OBS over the same set, in any order, with all that is left free to move."""
    weight, X = layer(7, 1, 9)
    problem = damped_problem(weight, InputStatistics.of(X), 0.01)
    for order in ([1, 4, 6, 8], [8, 1, 6, 4]):
        w, alive = weight[0].clone(), torch.ones(9, dtype=torch.bool)
        for p in order:
            index = alive.nonzero().flatten()
            inverse = torch.zeros(9, 9, dtype=torch.float64)
            inverse[index[:, None], index] = torch.linalg.inv(problem.H[index][:, index])
            w = w - w[p] / inverse[p, p] * inverse[:, p]
            w[p], alive[p] = 0, False
        assert torch.allclose(refit(problem, alive[None])[0], w, rtol=1e-9, atol=1e-11)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6), pattern=st.sampled_from(["row", "layer", "2:4", "1x2"]))
def test_the_refit_is_never_worse_than_sparsegpt_on_the_same_mask(seed, pattern):
    """By the damped error, for each row."""
    weight, X = layer(seed, 6, 16)
    statistics = InputStatistics.of(X)
    frozen = sparsegpt(weight, statistics, config_for("sparsegpt", pattern, block_size=8)).S
    problem = damped_problem(weight, statistics, 0.01)
    joint = refit(problem, frozen != 0)
    error = {n: (((W - weight) @ problem.H) * (W - weight)).sum(dim=1) for n, W in (("frozen", frozen), ("joint", joint))}
    assert (error["joint"] <= error["frozen"] * (1 + 1e-9)).all()
    assert error["joint"].sum() < 0.999 * error["frozen"].sum()


@pytest.mark.parametrize("pattern", ["row", "layer", "2:4", "1x2"])
def test_blockwise_mask_s_is_sparsegpts_mask_refitted(pattern):
    weight, X = layer(8, 6, 16)
    statistics = InputStatistics.of(X)
    mask = sparsegpt(weight, statistics, config_for("sparsegpt", pattern, block_size=8)).S != 0
    expected = refit(damped_problem(weight, statistics, 0.01), mask)
    assert torch.equal(mrp(weight, statistics, config_for("mrp", pattern, block_size=8)).S, expected)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6), kept=st.integers(1, 5), m=st.just(6))
def test_mask_m_is_the_best_pattern_by_brute_force(seed, kept, m):
    """One group that is the whole row: every pattern is refitted by lstsq, and the least error wins."""
    weight, X = layer(seed, 3, m)
    problem = damped_problem(weight, InputStatistics.of(X), 0.0)
    mask = joint_mask(weight, torch.linalg.inv(problem.H), kept)
    assert (mask.sum(dim=1) == kept).all()
    for w, chosen in zip(weight.numpy(), mask, strict=True):
        errors = {}
        for columns in combinations(range(m), kept):
            x = X.numpy()[:, columns]
            fit = np.linalg.lstsq(x, X.numpy() @ w, rcond=None)[0]
            errors[columns] = ((x @ fit - X.numpy() @ w) ** 2).sum()
        assert errors[tuple(chosen.nonzero().flatten().tolist())] <= min(errors.values()) * (1 + 1e-9)


def test_two_of_four_in_closed_form():
    """Removing a and b costs (h_bb w_a^2 + h_aa w_b^2 - 2 h_ab w_a w_b) / (h_aa h_bb - h_ab^2), h the inverse."""
    weight, X = layer(9, 50, 8)
    problem = damped_problem(weight, InputStatistics.of(X), 0.01)
    h = torch.linalg.inv(problem.H)[4:, 4:]
    w = weight[:, 4:]
    pairs = list(combinations(range(4), 2))
    cost = torch.stack(
        [
            (h[b, b] * w[:, a] ** 2 + h[a, a] * w[:, b] ** 2 - 2 * h[a, b] * w[:, a] * w[:, b])
            / (h[a, a] * h[b, b] - h[a, b] ** 2)
            for a, b in pairs
        ],
        dim=1,
    )
    expected = torch.ones(50, 4, dtype=torch.bool)
    for row, best in enumerate(cost.argmin(dim=1)):
        expected[row, list(pairs[best])] = False
    config = MRPConfig(compression=None, pattern="2:4", mask_choice="M", schedule="oneshot")
    assert torch.equal(oneshot_mask(problem, config)[:, 4:], expected)


@pytest.mark.parametrize("schedule", ["blockwise", "oneshot"])
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8"])
def test_where_inputs_do_not_correlate_mask_m_is_mask_s_is_wanda(schedule, pattern):
    """Damping shifts all moments alike, so it is off: else it is not quite Wanda's score."""
    weight, _ = layer(10, 20, 16)
    statistics = uncorrelated(16)
    masks = [wanda(weight, statistics, WandaConfig(compression=None, pattern=pattern)).S != 0]
    for choice in ("S", "M"):
        config = MRPConfig(compression=None, pattern=pattern, mask_choice=choice, schedule=schedule, damping=0.0)
        result = mrp(weight, statistics, config)
        masks.append(result.S != 0)
        assert torch.allclose(result.S, torch.where(masks[-1], weight, 0), rtol=1e-12)  # nothing to compensate
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(masks[1], masks[2])


def test_mask_m_and_the_schedule_lower_the_error():
    """On average over layers: neither holds for each single one."""
    errors = {(c, s): 0.0 for c in ("S", "M") for s in ("oneshot", "blockwise")}
    for seed in range(6):
        weight, X = layer(seed, 32, 32)
        for choice, schedule in errors:
            config = MRPConfig(compression=None, pattern="2:4", mask_choice=choice, schedule=schedule)
            errors[choice, schedule] += mrp(weight, InputStatistics.of(X), config).objective
    assert errors["M", "oneshot"] < errors["S", "oneshot"]
    assert errors["M", "blockwise"] < errors["S", "blockwise"]
    assert errors["S", "blockwise"] < errors["S", "oneshot"]


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
    with pytest.raises(InputError, match="lower --compression"):
        SVDConfig(compression=0.95).budget(12, 12)


# ---- DSNoT


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


# ---- ALPS


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
