"""Budgets add up, and are optimal on small problems."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.allocation.layers import LAYERS
from vitoats.allocation.lagrange import LEAST_KEPT, MOST_KEPT, allocate, check_compression, split
from vitoats.allocation.sensitivity import RATES, Sensitivity
from vitoats.common.errors import InputError


@pytest.mark.parametrize("compression", [0.3, 0.5, 0.6, 0.8])
def test_budgets_add_up(compression):
    budgets = allocate(LAYERS, (1 - compression) * 7000)
    removed = sum(s.parameters * budgets[s.name]["compression"] for s in LAYERS)
    assert removed / 7000 == pytest.approx(compression, abs=1e-9)


@pytest.mark.parametrize("compression", [0.4, 0.6])
def test_the_split_is_the_best_on_a_grid(compression):
    def total(shares):
        return sum(np.exp(s.log_error(np.array([share])))[0] for s, share in zip(LAYERS, shares, strict=True))

    budgets = allocate(LAYERS, (1 - compression) * 7000)
    found = total([1 - budgets[s.name]["compression"] for s in LAYERS])
    best = np.inf
    for a, b in product(np.arange(0.08, 0.95, 0.01), repeat=2):
        c = ((1 - compression) * 7000 - 1000 * a - 4000 * b) / 2000
        if 0.08 <= c <= 0.95:
            best = min(best, total([a, b, c]))
    assert found <= best * 1.01


def test_any_cost_that_rises_can_be_the_budget():
    """Bytes: four for each kept parameter, and a bit for each weight."""

    def bytes_of(layer, kept, _rank_ratio=None):
        return layer.parameters * (4 * kept + 1 / 8)

    budgets = allocate(LAYERS, 16_000, bytes_of)
    assert sum(bytes_of(s, 1 - budgets[s.name]["compression"]) for s in LAYERS) == pytest.approx(16_000)
    same = allocate(LAYERS, (16_000 - 7000 / 8) / 4)  # a constant for each layer changes nothing
    assert all(budgets[n]["compression"] == pytest.approx(same[n]["compression"], abs=0.01) for n in same)


@pytest.mark.parametrize("budget", [10, 6900])
def test_a_budget_out_of_range_is_refused(budget):
    with pytest.raises(InputError, match="allocation='uniform'"):
        allocate(LAYERS, budget)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 4), st.floats(0.05, 0.95))
def test_the_split_is_near_the_best_of_all(seed, n_layers, tightness):
    """Against all combinations: within the budget, and no worse than the best that saves the largest step of a layer."""
    random = np.random.default_rng(seed)
    kept = np.linspace(0.1, 1, 12)
    speed = random.uniform(2, 8, (n_layers, 1))
    scale = random.uniform(0.1, 3, (n_layers, 1))
    size = random.uniform(1, 5, (n_layers, 1))
    errors = scale * np.exp(-speed * kept)  # convex, as what is measured mostly is
    costs = size * kept
    errors, costs = np.hstack([errors, 1.2 * errors]), np.hstack([costs, 0.7 * costs])  # a second kind, cheaper and worse
    low, high = costs.min(axis=1).sum(), costs.max(axis=1).sum()
    budget = low + tightness * (high - low)
    layers = np.arange(n_layers)
    chosen = split(errors, costs, budget)
    assert costs[layers, chosen].sum() <= budget * (1 + 1e-12)

    def best_within(limit):
        return min(
            errors[layers, list(options)].sum()
            for options in product(range(24), repeat=n_layers)
            if costs[layers, list(options)].sum() <= limit
        )

    if n_layers < 4:  # 24^4 combinations take too long
        step = size.max() * 0.3  # the most that lies between two options next to each other on a layer's convex hull
        assert errors[layers, chosen].sum() >= best_within(budget) * (1 - 1e-9)
        assert errors[layers, chosen].sum() <= best_within(max(low, budget - step)) * (1 + 1e-9)


def test_an_option_that_is_not_there_is_not_chosen():
    errors, costs = np.array([[0.5, 0.1, 0.0]]), np.array([[1.0, np.inf, 3.0]])
    assert split(errors, costs, 2.9).tolist() == [0]
    assert split(errors, costs, 3.0).tolist() == [2]
    with pytest.raises(InputError, match="allocation='uniform'"):
        split(errors, costs, 0.9)


def test_rank_ratio_and_dense_layers_are_chosen_by_error_and_cost():
    """Low rank is dear here, and the layer "c" is ten times as sensitive without it; "b" is cheap to leave as it is."""

    def cost(layer, kept, rank_ratio):
        if layer.name == "b":
            return np.where(kept == 1, 900.0, 4000 * kept)
        return layer.parameters * kept * (1 if rank_ratio == 0 else 1.3)

    layers = [Sensitivity(s.name, s.parameters, s.errors, s.errors[2] * (10 if s.name == "c" else 1)) for s in LAYERS]
    budgets = allocate(layers, 3000, cost, (0.25, 0.0), may_stay_dense=True)
    assert budgets["b"] == {"compression": 0.0, "rank_ratio": 0.0}
    assert budgets["a"]["rank_ratio"] == 0.0
    assert budgets["c"]["rank_ratio"] == 0.25
    total = sum(cost(s, 1 - budgets[s.name]["compression"], budgets[s.name]["rank_ratio"]) for s in layers)
    assert 2990 < total <= 3000


def test_rates_span_what_is_allocated():
    assert 1 - MOST_KEPT < min(RATES) < max(RATES) < 1 - LEAST_KEPT


@pytest.mark.parametrize("compression", [0.01, 0.97])
def test_a_compression_out_of_range_is_refused_before_anything_is_measured(compression):
    with pytest.raises(InputError, match="allocation='uniform'"):
        check_compression(compression)
