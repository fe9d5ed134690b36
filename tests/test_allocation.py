"""Allocators: budgets that add up, that are optimal on small problems, and the published formula of OWL."""

from itertools import product

import numpy as np
import pytest
import torch

from vitoats.allocation import sensitivity
from vitoats.allocation.owl import outlier_shares, owl
from vitoats.allocation.sensitivity import RATES, Sensitivity, allocate, cached, check_compression, measure
from vitoats.calibration import HiddenStates
from vitoats.errors import InputError
from vitoats.methods.oats_h import OATSHConfig
from vitoats.models.adapter import adapt


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

    def bytes_of(layer, kept):
        return layer.parameters * (4 * kept + 1 / 8)

    budgets = allocate(LAYERS, 16_000, bytes_of)
    assert sum(bytes_of(s, 1 - budgets[s.name]["compression"]) for s in LAYERS) == pytest.approx(16_000)
    same = allocate(LAYERS, (16_000 - 7000 / 8) / 4)  # a constant for each layer changes nothing
    assert all(budgets[n]["compression"] == pytest.approx(same[n]["compression"], abs=0.01) for n in same)


@pytest.mark.parametrize("budget", [10, 6900])
def test_a_budget_out_of_range_is_refused(budget):
    with pytest.raises(InputError, match="--allocation uniform"):
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


def test_a_measurement_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = []

    def make():
        made.append(1)
        return LAYERS

    assert cached("k" * 64, make) == LAYERS
    assert cached("k" * 64, make) == LAYERS
    assert len(made) == 1
    file = next((tmp_path / "vitoats").iterdir())
    file.write_text('[{"name": 3}')  # damaged: measured again
    assert cached("k" * 64, make) == LAYERS
    assert len(made) == 2


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert cached("k" * 64, lambda: LAYERS) == LAYERS


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
    assert min(RATES) < 1 - sensitivity.LEAST_KEPT
    assert max(RATES) < 1


@pytest.mark.parametrize("compression", [0.01, 0.97])
def test_a_compression_out_of_range_is_refused_before_anything_is_measured(compression):
    with pytest.raises(InputError, match="--allocation uniform"):
        check_compression(compression)


def test_one_image_gives_no_budgets(tiny):
    adapter, hidden = hidden_of(tiny, torch.randn(1, 3, 32, 32))
    with pytest.raises(InputError, match="--allocation uniform"):
        measure(adapter, hidden, OATSHConfig())
    found = measure(*hidden_of(tiny, torch.randn(2, 3, 32, 32)), OATSHConfig())
    assert np.isfinite([s.errors for s in found]).all()
