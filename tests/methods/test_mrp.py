"""The joint refit and MRP against least squares, closed forms and brute force."""

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.problems import config_for, layer, random_mask, uncorrelated
from vitoats.methods.hessian import damped_problem, refit
from vitoats.methods.mrp import MRPConfig, joint_mask, mrp, oneshot_mask
from vitoats.methods.sparsegpt import sparsegpt
from vitoats.methods.statistics import InputStatistics
from vitoats.methods.wanda import WandaConfig, wanda


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
