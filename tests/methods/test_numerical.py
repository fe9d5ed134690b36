"""Numerical Pruning: scores against their formulas, the cut by brute force, the refit against least squares."""

from math import inf

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.methods.test_solvers import layer
from vitoats.common.errors import InputError
from vitoats.methods.numerical import NumericalConfig, closed_form, compensated, cut, newton, numerical, removal_costs
from vitoats.methods.statistics import InputStatistics

SEEDS = st.integers(0, 10**6)


def program(seed: int, d_out: int, d_in: int):
    """(W, X, A): A positive definite."""
    weight, X = layer(seed, d_out, d_in)
    return weight, X, removal_costs(weight, X.T @ X / len(X)) + 1e-6 * torch.eye(d_in).double()


def objective(z, A, kept, penalty):
    return 0.5 * (z - 1) @ A @ (z - 1) + 0.5 * penalty * (z.sum() - kept) ** 2


# ---- scores


@settings(deadline=None, max_examples=40)
@given(
    seed=SEEDS,
    d_out=st.integers(2, 9),
    d_in=st.integers(2, 9),
    steps=st.integers(1, 4),
    penalty=st.sampled_from([0.1, 30, inf]),
)
def test_newton_steps_are_the_closed_form(seed, d_out, d_in, steps, penalty):
    _, _, A = program(seed, d_out, d_in)
    kept = 0.6 * d_in
    closed = closed_form(A, kept, penalty)
    assert torch.allclose(newton(A, kept, penalty, steps), closed, atol=1e-6 * closed.abs().max())
    if penalty == inf:
        assert closed.sum() == pytest.approx(kept)
        residual = A @ (closed - 1)  # a multiple of 1: the constrained optimum
        assert torch.allclose(residual, residual.mean().expand(d_in), atol=1e-8 * A.abs().max() * closed.abs().max())


@settings(deadline=None, max_examples=20)
@given(seed=SEEDS, penalty=st.sampled_from([0.1, 3.0]))
def test_a_finite_penalty_minimises_the_objective(seed, penalty):
    """By gradients of autograd, an independent derivation."""
    _, _, A = program(seed, 8, 6)
    z = closed_form(A, 3.0, penalty).requires_grad_()
    objective(z, A, 3.0, penalty).backward()
    assert z.grad.abs().max() < 1e-8 * A.abs().max()


def test_a_large_penalty_tends_to_the_infinite_one():
    _, _, A = program(1, 8, 6)
    assert torch.allclose(closed_form(A, 3.0, 1e12), closed_form(A, 3.0, inf), atol=1e-6)


@settings(deadline=None, max_examples=30)
@given(seed=SEEDS, rho=st.floats(0.05, 0.9), penalty=st.sampled_from([0.5, 0.0]))
def test_a_module_ranks_by_minus_u_whatever_lambda_and_rho(seed, rho, penalty):
    weight, X = layer(seed, 9, 8)
    config = NumericalConfig(compression=rho, penalty=penalty)
    z = numerical(weight, InputStatistics.of(X), 1, config)
    A = removal_costs(weight, X.T @ X)
    u = torch.linalg.solve(A + 1e-4 * A.diagonal().mean() * torch.eye(8).double(), torch.ones(8).double())
    assert torch.equal(z.argsort(), (-u).argsort())


def test_uncorrelated_inputs_give_structured_wanda():
    """u_i is then 1 / (||W_i||^2 ||X_i||^2), so the ranking is that of ||W_i|| ||X_i||."""
    weight, _ = layer(3, 10, 8)
    moments = torch.rand(8).double() + 0.1
    z = numerical(weight, InputStatistics(moments, moments.diag(), torch.zeros(8).double()), 1, NumericalConfig())
    wanda = weight.norm(dim=0) * moments.sqrt()
    assert torch.equal(z.argsort(), wanda.argsort())


@settings(deadline=None, max_examples=30)
@given(seed=SEEDS, gone=st.sets(st.integers(0, 6), min_size=1, max_size=6))
def test_the_cost_of_removal_is_the_sum_of_its_block(seed, gone):
    weight, X = layer(seed, 5, 7)
    P = sorted(gone)
    cost = removal_costs(weight, X.T @ X)[P][:, P].sum()
    assert cost.item() == pytest.approx((X[:, P] @ weight[:, P].T).square().sum().item())


def test_head_scores():
    """mean: of the columns' scores. qp: the program whose A is the cost of removing whole heads, by brute force."""
    weight, X = layer(4, 10, 12)
    statistics = InputStatistics.of(X)
    columns = numerical(weight, statistics, 1, NumericalConfig())
    heads = numerical(weight, statistics, 4, NumericalConfig())
    assert torch.allclose(heads, columns.view(3, 4).mean(dim=1))
    heads = numerical(weight, statistics, 4, NumericalConfig(head_score="qp"))
    outputs = [X[:, i : i + 4] @ weight[:, i : i + 4].T for i in (0, 4, 8)]
    A = torch.tensor([[(a * b).sum().item() / len(X) for a in outputs] for b in outputs]).double()
    expected = closed_form(A + 1e-4 * A.diagonal().mean() * torch.eye(3).double(), 1.5, inf)
    assert torch.allclose(heads, expected, rtol=1e-5)


def test_dead_inputs_and_zero_columns_go_first():
    weight, X = layer(5, 6, 8)
    weight[:, 2] = 0
    X[:, 6] = 0
    z = numerical(weight, InputStatistics.of(X), 1, NumericalConfig())
    assert set(z.argsort()[:2].tolist()) == {2, 6}
    assert torch.isfinite(numerical(weight * 0, InputStatistics.of(X), 1, NumericalConfig())).all()


# ---- the cut


@settings(deadline=None, max_examples=60)
@given(seed=SEEDS, compression=st.floats(0.0, 0.8), weights=st.lists(st.integers(1, 40), min_size=2, max_size=4))
def test_the_weighted_cut_is_the_nearest_threshold(seed, compression, weights):
    """By brute force over all thresholds; within half of the largest unit where every module has a unit to spare."""
    generator = torch.Generator().manual_seed(seed)
    scores = [torch.rand(6, generator=generator).double() for _ in weights]
    masks = cut(scores, weights, NumericalConfig(compression=compression))
    total = 6 * sum(weights)
    wanted = (1 - compression) * total

    def at(threshold):
        return [(s >= threshold) | (s == s.max()) for s in scores]

    def size(masks):
        return sum(int(m.sum()) * w for m, w in zip(masks, weights, strict=True))

    best = min(abs(size(at(t)) - wanted) for t in [*torch.cat(scores).tolist(), 2.0])
    assert abs(size(masks) - wanted) == pytest.approx(best)
    assert best <= max(weights) / 2 + 1e-9
    assert all(m.any() for m in masks)
    lowest_kept = min(
        s[m & (s < s.max())].min() if (m & (s < s.max())).any() else inf for s, m in zip(scores, masks, strict=True)
    )
    assert all((s[~m] <= lowest_kept).all() for s, m in zip(scores, masks, strict=True))


def test_the_literal_cut_counts_units_and_weighs_head_scores():
    heads, neurons = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.1, 0.6, 0.7, 0.8, 0.9])
    masks = cut([heads, neurons], [128, 1], NumericalConfig(compression=0.5, cut="literal"))
    assert [m.tolist() for m in masks] == [[True] * 3, [False] * 4 + [True]]  # 128 * 0.3 is above every neuron


@given(st.integers(0, 5), st.floats(0.05, 0.95))
def test_the_equal_cut_keeps_the_best_of_each_module(seed, compression):
    generator = torch.Generator().manual_seed(seed)
    scores = [torch.rand(n, generator=generator, dtype=torch.float64) for n in (3, 40, 3, 40)]
    weights = [100, 7, 100, 7]
    masks = cut(scores, weights, NumericalConfig(compression=compression, cut="equal"))
    assert [int(m.sum()) for m in masks[:2]] == [int(m.sum()) for m in masks[2:]]
    for mask, score in zip(masks, scores, strict=True):
        assert mask.any()
        assert mask.all() or score[mask].min() >= score[~mask].max()
    kept = sum(w * int(m.sum()) for w, m in zip(weights, masks, strict=True))
    groups, neurons = (int(m.sum()) for m in masks[:2])
    assert groups == max(1, round(3 * (1 - compression)))
    if 1 < neurons < 40:  # else they cannot make up for the groups
        assert abs(kept - (1 - compression) * 2 * (300 + 280)) <= 7


def test_a_cut_that_leaves_a_module_empty_is_refused():
    scores = [torch.tensor([0.2, 0.3]), torch.tensor([0.5, 0.6])]
    with pytest.raises(InputError, match=r"lower `compression` to 0\.5 or less"):
        cut(scores, [10, 10], NumericalConfig(compression=0.9))


# ---- the refit


def split(seed, d_out=5, d_in=8, n_kept=5):
    weight, X = layer(seed, d_out, d_in)
    kept = torch.randperm(d_in, generator=torch.Generator().manual_seed(seed))[:n_kept].sort().values
    gone = torch.tensor([i for i in range(d_in) if i not in kept])
    return weight, X, kept, gone, torch.from_numpy(layer(seed + 1, 1, d_out)[0].numpy()[0])


@settings(deadline=None, max_examples=30)
@given(seed=SEEDS)
def test_the_refit_is_ordinary_least_squares(seed):
    """Against lstsq on the tokens, with a column of ones for the bias; and against the constrained form of the paper."""
    weight, X, kept, gone, bias = split(seed)
    Y = X @ weight.T
    config = NumericalConfig(damping=0.0)
    ones = torch.ones(len(X), 1).double()
    solved = torch.linalg.lstsq(torch.cat([X[:, kept], ones], 1), Y + bias).solution
    fitted, shifted, error = compensated(weight, bias, InputStatistics.of(X), kept, config)
    assert torch.allclose(fitted, solved[:-1].T, atol=1e-6)
    assert torch.allclose(shifted, solved[-1], atol=1e-6)
    measured = (X[:, kept] @ fitted.T + shifted - Y - bias).norm() / Y.norm()
    assert error == pytest.approx(measured.item(), rel=1e-5)

    plain, same, plain_error = compensated(
        weight, bias, InputStatistics.of(X), kept, NumericalConfig(damping=0.0, refit_bias=False)
    )
    inverse = torch.linalg.inv(2 * X.T @ X)
    change = -inverse[:, gone] @ torch.linalg.solve(inverse[gone][:, gone], weight[:, gone].T)
    assert torch.allclose(plain, (weight + change.T)[:, kept], atol=1e-6)
    assert same is bias
    loss = 0.5 * (weight[:, gone] @ torch.linalg.solve(inverse[gone][:, gone], weight[:, gone].T)).trace()
    assert (plain_error * Y.norm()).item() ** 2 == pytest.approx(loss.item(), rel=1e-5)
    assert error <= plain_error * (1 + 1e-9)  # the bias only helps


@settings(deadline=None, max_examples=20)
@given(seed=SEEDS, damping=st.floats(0.001, 0.5))
def test_the_damped_refit_minimises_the_damped_loss(seed, damping):
    """||X dW^T||^2 / n + damping mean(diag) ||dW||^2 over the kept columns: no small step from it is better."""
    weight, X, kept, _, _ = split(seed)
    H = X.T @ X / len(X)
    H_damped = H + damping * H.diagonal().mean() * torch.eye(8).double()
    fitted, bias, _ = compensated(weight, None, InputStatistics.of(X), kept, NumericalConfig(damping=damping))
    assert bias is None
    change = -weight.clone()
    change[:, kept] = fitted - weight[:, kept]
    gradient = (change @ H_damped)[:, kept]
    assert gradient.abs().max() < 1e-9 * (change @ H_damped).abs().max().clamp(min=1)


def test_without_compensation_columns_just_go():
    weight, X, kept, gone, bias = split(3)
    fitted, same, error = compensated(weight, bias, InputStatistics.of(X), kept, NumericalConfig(compensation="none"))
    assert torch.equal(fitted, weight[:, kept])
    assert same is bias
    assert error == pytest.approx(((X[:, gone] @ weight[:, gone].T).norm() / (X @ weight.T).norm()).item())


def test_dead_and_constant_inputs_stay_finite():
    weight, X, kept, _, bias = split(3)
    X[:, kept[0]] = 0
    X[:, kept[1]] = 2.0
    fitted, shifted, error = compensated(weight, bias, InputStatistics.of(X), kept, NumericalConfig())
    assert torch.isfinite(fitted).all()
    assert torch.isfinite(shifted).all()
    assert 0 < error < 1


@pytest.mark.parametrize("broken", ["weight", "input"])
def test_numbers_that_are_not_finite_are_refused(broken):
    weight, X, kept, _, bias = split(2)
    (weight if broken == "weight" else X)[1, 2] = float("nan")
    with pytest.raises(InputError, match="not finite"):
        numerical(weight, InputStatistics.of(X), 1, NumericalConfig())
    with pytest.raises(InputError, match="not finite"):
        compensated(weight, bias, InputStatistics.of(X), kept, NumericalConfig())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"compression": 1.0}, "`compression`"),
        ({"compression": float("nan")}, "`compression`"),
        ({"iterations": -1}, "`iterations`"),
        ({"penalty": -1.0}, "0 for an infinite one"),
        ({"penalty": inf}, "0 for an infinite one"),
        ({"damping": -1.0}, "damping"),
        ({"head_score": "max"}, "mean or qp"),
        ({"cut": "flat"}, "weighted or literal"),
        ({"compensation": "yes"}, "sequential or dense or none"),
    ],
)
def test_settings_out_of_range_are_refused(options, said):
    with pytest.raises(InputError, match=said):
        NumericalConfig(**options)
