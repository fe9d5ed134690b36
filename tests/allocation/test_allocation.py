"""Allocators: budgets that add up, that are optimal on small problems, and the published formula of OWL."""

import copy
from dataclasses import asdict
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitoats.allocation.lagrange import LEAST_KEPT, MOST_KEPT, allocate, check_compression, split
from vitoats.allocation.owl import outlier_shares, owl
from vitoats.allocation.sensitivity import (
    FIRST_BLOCK_SHARE,
    RATE_WITHOUT_RANK,
    RATES,
    Sensitivity,
    counted_by_depth,
    measure,
)
from vitoats.calibration.hidden_states import HiddenStates
from vitoats.common.cache import cached
from vitoats.common.errors import InputError
from vitoats.compression.pipeline import compress
from vitoats.evaluation.fidelity import pooled, relative_error
from vitoats.methods.oats_h import OATSHConfig
from vitoats.models.adapter import LinearLayer, adapt


def decaying(name: str, parameters: int, scale: float, speed: float) -> Sensitivity:
    """A layer whose feature error is scale * exp(-speed * kept share)."""
    return Sensitivity(name, parameters, tuple(scale * np.exp(-speed * (1 - rate)) for rate in RATES))


LAYERS = [decaying("a", 1000, 0.5, 6.0), decaying("b", 4000, 0.1, 5.0), decaying("c", 2000, 2.0, 8.0)]


def hidden_of(model, images):
    adapter = adapt(model, 32)
    return adapter, HiddenStates.collect(adapter, iter(images.split(4)), len(images), 4)


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
    with pytest.raises(InputError, match="`allocation='uniform'`"):
        allocate(LAYERS, budget)


def test_the_logarithm_is_linear_between_rates_and_beyond():
    layer = LAYERS[0]
    kept = np.linspace(0.08, 0.95, 30)
    assert np.allclose(layer.log_error(kept), np.log(0.5) - 6.0 * kept)


def test_noise_never_makes_keeping_more_look_worse():
    bumpy = Sensitivity("x", 100, (0.2, 0.1, 0.3, 0.9))  # 55 % removed looked better than 35 %
    assert (np.diff(bumpy.log_error(np.linspace(0.08, 0.95, 50))) <= 1e-12).all()


def test_layers_are_measured_one_at_a_time_and_the_model_stays_as_it_was(tiny):
    adapter, hidden = hidden_of(tiny, torch.randn(24, 3, 32, 32))
    before = {name: value.clone() for name, value in tiny.state_dict().items()}
    found = measure(adapter, hidden, OATSHConfig(rank_ratio=0.1))
    assert [s.name for s in found] == [x.name for block in adapter.linears for x in block]
    assert all(torch.equal(value, before[name]) for name, value in tiny.state_dict().items())
    assert all(0 < s.errors[0] < s.errors[-1] for s in found)


@pytest.mark.parametrize("refit_bias", [False, True])
def test_what_is_measured_is_what_compressing_that_layer_alone_does(tiny, refit_bias):
    """Against the whole pipeline, where all other layers keep what they have."""
    for module in tiny.modules():
        if isinstance(module, torch.nn.LayerNorm):
            torch.nn.init.normal_(module.bias)  # inputs whose mean matters
    images = torch.randn(12, 3, 32, 32)
    adapter, hidden = hidden_of(tiny, images)
    dense, layers = tiny.state_dict(), [x.name for block in adapter.linears for x in block]
    found = {s.name: s.errors for s in measure(adapter, hidden, OATSHConfig(), refit_bias)}
    quick = OATSHConfig(compression=RATES[2], solver="support", iterations=8, refit_rounds=2, refit_iterations=4)
    for name in layers[4:8]:
        alone = copy.deepcopy(tiny)
        alone.load_state_dict(dense)
        budgets = {x: {"compression": 0.0, "rank_ratio": 0.0} for x in layers if x != name}
        compress(
            alone,
            iter(images.split(4)),
            method="oats-h",
            config=quick,
            img_size=32,
            nsamples=12,
            batch_size=4,
            refit_bias=refit_bias,
            budgets=budgets,
        )
        with torch.inference_mode():
            features, reference = (pooled(m, m.forward_features(images), normed=True).numpy() for m in (alone, tiny))
        assert relative_error(features, reference) == pytest.approx(found[name][2], rel=1e-3)


def test_errors_count_the_less_the_more_blocks_can_make_up_for_them():
    blocks = [[LinearLayer(f"{block}.{i}", 1) for i in range(2)] for block in range(3)]
    measured = [Sensitivity(x.name, 10, (0.1, 0.2, 0.3, 0.4), 0.5) for block in blocks for x in block]
    counted = {s.name: s for s in counted_by_depth(measured, blocks)}
    assert counted["2.1"] == measured[-1]
    assert counted["0.0"].errors == pytest.approx([FIRST_BLOCK_SHARE * e for e in measured[0].errors])
    assert counted["1.0"].without_rank ** 2 == pytest.approx(counted["0.0"].without_rank * counted["2.0"].without_rank)


def test_without_a_low_rank_term_layers_are_measured_too(tiny):
    found = measure(*hidden_of(tiny, torch.randn(12, 3, 32, 32)), OATSHConfig(), without_rank=True)
    alone = measure(*hidden_of(tiny, torch.randn(12, 3, 32, 32)), OATSHConfig())
    assert all(s.without_rank > 0 for s in found)
    assert all(s.without_rank is None for s in alone)
    again = measure(*hidden_of(tiny, torch.randn(12, 3, 32, 32)), OATSHConfig(rank_ratio=0.0))
    assert [len(s.errors) for s in again] == [len(RATES)] * 12


def test_the_error_without_a_low_rank_term_is_the_same_factor_off_everywhere():
    layer = Sensitivity("x", 100, (0.1, 0.2, 0.4, 0.8), without_rank=0.6)
    kept = np.array([0.1, 0.5, 1 - RATE_WITHOUT_RANK, 1.0])
    assert np.allclose(layer.error(kept, 0.0), 1.5 * layer.error(kept, 0.25))
    assert layer.error(kept, 0.0)[2:].tolist() == pytest.approx([0.6, 0])
    assert np.array_equal(layer.error(kept, None), layer.error(kept, 0.25))
    unknown = Sensitivity("x", 100, (0.1, 0.2, 0.4, 0.8))
    assert np.array_equal(unknown.error(kept, 0.0), unknown.error(kept, 0.25))


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
    with pytest.raises(InputError, match="`allocation='uniform'`"):
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


def test_a_measurement_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = []

    def make():
        made.append(1)
        return [asdict(s) for s in LAYERS]

    def read(rows):
        return [Sensitivity.from_json(row) for row in rows]

    assert cached("k", read, make) == LAYERS
    assert cached("k", read, make) == LAYERS
    assert len(made) == 1
    file = next((tmp_path / "vitoats").iterdir())
    file.write_text('[{"name": 3}')  # damaged: measured again
    assert cached("k", read, make) == LAYERS
    assert len(made) == 2


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert cached("k", list, lambda: [1, 2]) == [1, 2]


def test_owl_by_hand(tiny):
    adapter = adapt(tiny, 32)
    budgets = owl(adapter, [0.01, 0.03, 0.02], 0.6, spread=0.08)
    density = np.array([0.0, 0.16, 0.08]) - 0.08 + 0.4
    for block in range(3):
        for layer in ("attn.qkv", "mlp.fc2"):
            assert budgets[f"blocks.{block}.{layer}"]["compression"] == pytest.approx(1 - density[block])
    same = owl(adapter, [0.02, 0.02, 0.02], 0.6)
    assert all(b["compression"] == pytest.approx(0.6) for b in same.values())


def test_outliers_by_hand(tiny):
    """One weight of the last layer made huge is the only outlier of its block."""
    images = torch.randn(8, 3, 32, 32)
    tiny.blocks[1].mlp.fc2.weight.data[3, 7] = 1e8
    adapter, hidden = hidden_of(tiny, images)
    shares = outlier_shares(adapter, hidden)
    assert shares[1] == pytest.approx(1 / (12 * 48 * 48))
    assert shares[0] > shares[1]


def test_rates_span_what_is_allocated():
    assert 1 - MOST_KEPT < min(RATES) < max(RATES) < 1 - LEAST_KEPT


@pytest.mark.parametrize("compression", [0.01, 0.97])
def test_a_compression_out_of_range_is_refused_before_anything_is_measured(compression):
    with pytest.raises(InputError, match="`allocation='uniform'`"):
        check_compression(compression)


def test_one_image_gives_no_budgets(tiny):
    adapter, hidden = hidden_of(tiny, torch.randn(1, 3, 32, 32))
    with pytest.raises(InputError, match="`allocation='uniform'`"):
        measure(adapter, hidden, OATSHConfig())
    found = measure(*hidden_of(tiny, torch.randn(2, 3, 32, 32)), OATSHConfig())
    assert np.isfinite([s.errors for s in found]).all()
