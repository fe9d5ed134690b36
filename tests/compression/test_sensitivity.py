"""What is measured of a layer is what compressing it alone does."""

import copy

import numpy as np
import pytest
import torch

from tests.calibration.states import collect
from tests.in_place import compress_in_place, job_of
from vitoats.allocation.sensitivity import RATES
from vitoats.common import unfinished
from vitoats.common.errors import InputError
from vitoats.common.unfinished import Unfinished
from vitoats.compression.sensitivity import measure_sensitivities
from vitoats.evaluation.fidelity import relative_error
from vitoats.methods.oats_h import OATSHConfig


def test_layers_are_measured_one_at_a_time_and_the_model_stays_as_it_was(tiny):
    adapter, hidden = collect(tiny, torch.randn(24, 3, 32, 32))
    before = {name: value.clone() for name, value in tiny.state_dict().items()}
    found = measure_sensitivities(adapter, hidden, OATSHConfig(rank_ratio=0.1))
    assert [s.name for s in found] == [x.name for x in adapter.linears]
    assert all(torch.equal(value, before[name]) for name, value in tiny.state_dict().items())
    assert all(0 < s.errors[0] < s.errors[-1] for s in found)


@pytest.mark.parametrize("refit_bias", [False, True])
def test_what_is_measured_is_what_compressing_that_layer_alone_does(tiny, refit_bias):
    """Against the whole pipeline, where all other layers keep what they have."""
    for module in tiny.modules():
        if isinstance(module, torch.nn.LayerNorm):
            torch.nn.init.normal_(module.bias)  # inputs whose mean matters
    images = torch.randn(12, 3, 32, 32)
    adapter, hidden = collect(tiny, images)
    dense, layers = tiny.state_dict(), [x.name for x in adapter.linears]
    found = {s.name: s.errors for s in measure_sensitivities(adapter, hidden, OATSHConfig(), refit_bias)}
    quick = OATSHConfig(compression=RATES[2], solver="support", iterations=8, refit_rounds=2, refit_iterations=4)
    for name in layers[4:8]:
        alone = copy.deepcopy(tiny)
        alone.load_state_dict(dense)
        budgets = {x: {"compression": 0.0, "rank_ratio": 0.0} for x in layers if x != name}
        compress_in_place(alone, images, job_of("oats-h", quick, refit_bias=refit_bias), budgets)
        with torch.inference_mode():
            features, reference = (adapter.inputs.features(m, images).numpy() for m in (alone, tiny))
        assert relative_error(features, reference) == pytest.approx(found[name][2], rel=1e-3)


def test_without_a_low_rank_term_layers_are_measured_too(tiny):
    found = measure_sensitivities(*collect(tiny, torch.randn(12, 3, 32, 32)), OATSHConfig(), without_rank=True)
    alone = measure_sensitivities(*collect(tiny, torch.randn(12, 3, 32, 32)), OATSHConfig())
    assert all(s.without_rank > 0 for s in found)
    assert all(s.without_rank is None for s in alone)
    again = measure_sensitivities(*collect(tiny, torch.randn(12, 3, 32, 32)), OATSHConfig(rank_ratio=0.0))
    assert [len(s.errors) for s in again] == [len(RATES)] * 12


def test_one_image_gives_no_budgets(tiny):
    adapter, hidden = collect(tiny, torch.randn(1, 3, 32, 32))
    with pytest.raises(InputError, match="allocation='uniform'"):
        measure_sensitivities(adapter, hidden, OATSHConfig())
    found = measure_sensitivities(*collect(tiny, torch.randn(2, 3, 32, 32)), OATSHConfig())
    assert np.isfinite([s.errors for s in found]).all()


def test_an_interrupted_measurement_goes_on_and_gives_the_same(tiny, monkeypatch):
    monkeypatch.setattr(unfinished, "SECONDS", 0.0)
    images = torch.randn(12, 3, 32, 32)
    whole = measure_sensitivities(*collect(tiny, images), OATSHConfig())
    measured = []

    def stop(block, what):
        measured.append((block, what))
        if (block, what) == (1, "blocks.1.mlp.fc1"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_sensitivities(*collect(tiny, images), OATSHConfig(), progress=stop, unfinished=Unfinished("s"))
    measured.clear()
    again = measure_sensitivities(
        *collect(tiny, images), OATSHConfig(), progress=lambda *step: measured.append(step), unfinished=Unfinished("s")
    )
    assert again == whole
    assert (0, "resuming") in measured
    assert {block for block, what in measured if what != "resuming"} == {1, 2}
