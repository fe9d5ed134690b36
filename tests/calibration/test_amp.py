"""Models under autocast while they calibrate: the arithmetic of statistics, targets and solvers stays what it is."""

import copy

import pytest
import torch

import vitoats
from tests.calibration.states import collect, scaled
from tests.in_place import compress_in_place, job_of
from tests.language_models import PROSE, make_model, make_tokenizer
from vitoats.calibration.moments import input_statistics
from vitoats.common.errors import InputError
from vitoats.compression.structural import prune
from vitoats.methods.numerical import NumericalConfig
from vitoats.methods.oats import OATSConfig
from vitoats.methods.oats_h import OATSHConfig
from vitoats.methods.registry import Recipe
from vitoats.models.adapter import adapt
from vitoats.models.inputs import ImageInputs

BFLOAT16 = 2**-7  # relative errors of a product of bfloat16 numbers, generously


@pytest.mark.parametrize("level", ["diagonal", "full"])
def test_blocks_run_in_bfloat16_and_moments_are_summed_in_float32(tiny, level):
    images = torch.randn(8, 3, 32, 32)
    found = []
    for amp in (False, True):
        adapter, hidden = collect(tiny, images, amp=amp)
        found.append(input_statistics(hidden, adapter.blocks[0], level))
        hidden.advance(adapter.blocks[0])
        assert hidden.values.dtype == torch.float32
    first, *others = found[0]
    a, b = (x[first] for x in found)
    assert torch.equal(a.second_moment, b.second_moment)  # the first layer's input has seen no product yet
    assert level == "diagonal" or torch.equal(a.H, b.H)
    for name in others:
        a, b = (x[name].second_moment for x in found)
        assert not torch.equal(a, b), name
        assert (a - b).abs().max() < 4 * BFLOAT16 * a.max(), name


@pytest.mark.parametrize(
    ("method", "config", "target"),
    [("oats", OATSConfig(compression=0.5), "block"), ("oats-h", OATSHConfig(compression=0.5), "residual")],
)
def test_the_result_is_nearly_that_of_float32(method, config, target):
    images, rows = torch.randn(8, 3, 32, 32), []
    for amp in (False, True):
        torch.manual_seed(0)
        model = scaled()
        rows.append(compress_in_place(model, images, job_of(method, config, target=target, amp=amp)).layers)
        assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert rows[0][-1].relative_error != rows[1][-1].relative_error
    for a, b in zip(*rows, strict=True):
        assert b.relative_error == pytest.approx(a.relative_error, rel=0.1), a.name


def test_structural_pruning_takes_it_too(tiny):
    images, rows = torch.randn(8, 3, 32, 32), []
    for amp in (False, True):
        model = copy.deepcopy(tiny)
        job = job_of("numerical", NumericalConfig(compression=0.4), amp=amp)
        rows.append(prune(adapt(model, ImageInputs(32)), job, iter(images.split(3)), len(images)).modules)
        assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert rows[0] != rows[1]


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2", "mamba"])
def test_language_models(tmp_path, kind):
    (tmp_path / "a.txt").write_text(PROSE)
    files, found = [tmp_path / "a.txt"], []
    for amp in (False, True):
        made = vitoats.compress(make_model(kind), files, tokenizer=make_tokenizer(), nsamples=16, seq_len=16, amp=amp)
        found.append(made.about["feature_error"]["own"])
    assert found[0] != found[1]
    assert found[1] == pytest.approx(found[0], rel=0.5)


def test_it_is_yes_or_no():
    with pytest.raises(InputError, match="`amp` takes True or False"):
        Recipe(amp="bfloat16")
