"""Smoothed inputs: the model computes the same, and outlier channels no longer cost the others their precision."""

import copy

import pytest
import torch
from torch import nn

from tests.calibration.states import collect
from tests.conftest import make_tiny
from tests.in_place import compress_in_place, job_of
from vitoats.calibration.hidden_states import HiddenStates
from vitoats.compression.resume import BlockStore
from vitoats.compression.run import draw_images
from vitoats.compression.settings import make_job
from vitoats.compression.smoothing import smooth
from vitoats.evaluation.fidelity import relative_error
from vitoats.format.int8_layers import to_int8
from vitoats.loading.load import load_model
from vitoats.methods.mrp import MRPConfig
from vitoats.models.adapter import adapt
from vitoats.models.inputs import ImageInputs

IMAGES = torch.randn(9, 3, 32, 32, generator=torch.Generator().manual_seed(1))
TINY_INPUTS = ImageInputs(32)
PAIRS = (("norm1", "attn.qkv"), ("norm2", "mlp.fc1"))


def with_outliers(factor=100.0, channel=7) -> nn.Module:
    """The tiny model with one channel behind each norm made larger, and its weights smaller: the same function."""
    model = make_tiny().requires_grad_(False)
    enlarge(model, factor, channel)
    return model


def enlarge(model, factor, channel=7) -> None:
    for block in model.blocks:
        for norm, layer in PAIRS:
            for parameter in block.get_submodule(norm).parameters():
                parameter.data[channel] *= factor
            block.get_submodule(layer).weight.data[:, channel] /= factor


def smoothed(model) -> nn.Module:
    adapter, hidden = collect(model, IMAGES)
    for block in adapter.blocks:
        smooth(block, hidden, [layer.name for layer in block.linears])
        hidden.advance(block)
    return model


def rounded(model, inputs=TINY_INPUTS) -> nn.Module:
    model = copy.deepcopy(model)
    for layer in adapt(model, inputs).linears:
        model.set_submodule(layer.name, to_int8(layer.module))
    return model


@torch.inference_mode()
def loss(model) -> float:
    expected = make_tiny()(IMAGES)
    return ((model(IMAGES) - expected).norm() / expected.norm()).item()


def test_outliers_cost_int8_its_precision_and_smoothing_gives_it_back():
    plain, outliers, remedied = (loss(rounded(model)) for model in (make_tiny(), with_outliers(), smoothed(with_outliers())))
    assert outliers > 4 * plain
    assert remedied < 1.5 * plain


def test_smoothing_changes_no_bit_of_what_a_model_computes():
    for make in (make_tiny, with_outliers):
        with torch.inference_mode():
            assert torch.equal(smoothed(make())(IMAGES), make()(IMAGES))


def test_scales_by_hand():
    model = make_tiny()
    adapter, hidden = collect(model, IMAGES)
    block = adapter.blocks[0]
    before = {name: value.clone() for name, value in block.module.state_dict().items()}
    changed = smooth(block, hidden, [layer.name for layer in block.linears])
    assert sorted(changed) == [f"blocks.0.{norm}.{name}" for norm in ("norm1", "norm2") for name in ("bias", "weight")]
    with torch.inference_mode():
        x = make_tiny().blocks[0].norm1(hidden.values)
    expected = (x.abs().amax(dim=(0, 1)) / before["attn.qkv.weight"].abs().amax(dim=0)).sqrt()
    s = before["norm1.weight"] / block.module.norm1.weight
    assert torch.equal(s.log2(), s.log2().round())
    assert ((s / expected).log2().abs() <= 0.501).all()
    assert torch.equal(block.module.attn.qkv.weight, before["attn.qkv.weight"] * s)
    assert torch.equal(block.module.norm1.bias, before["norm1.bias"] / s)
    assert all(torch.equal(block.module.state_dict()[name], before[name]) for name in before if "proj" in name or "fc2" in name)


def test_channels_that_are_zero_or_unread_stay_as_they_are():
    model = make_tiny().requires_grad_(False)
    model.blocks[0].norm1.weight[3] = model.blocks[0].norm1.bias[3] = 0
    model.blocks[0].attn.qkv.weight[:, 5] = 0
    adapter, hidden = collect(model, IMAGES)
    before = model.blocks[0].norm1.weight.clone()
    smooth(adapter.blocks[0], hidden, ["blocks.0.attn.qkv"])
    assert torch.equal(model.blocks[0].norm1.weight[[3, 5]], before[[3, 5]])
    assert torch.isfinite(model.blocks[0].norm1.weight).all()


class Twice(nn.Module):
    """A layer whose input something else reads, too."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, x):
        return self.linear(x) + x.mean(dim=-1, keepdim=True)


def test_a_norm_that_feeds_something_else_stays_as_it_is():
    model = make_tiny()
    model.blocks[0].mlp.fc1 = Twice(model.blocks[0].mlp.fc1)
    adapter, hidden = collect(model, IMAGES)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    changed = smooth(adapter.blocks[0], hidden, [layer.name for layer in adapter.blocks[0].linears])
    assert sorted(changed) == ["blocks.0.norm1.bias", "blocks.0.norm1.weight"]
    assert torch.equal(model.state_dict()["blocks.0.norm2.weight"], before["blocks.0.norm2.weight"])
    assert torch.equal(model.state_dict()["blocks.0.mlp.fc1.linear.weight"], before["blocks.0.mlp.fc1.linear.weight"])


def test_only_layers_that_quantize_are_smoothed():
    adapter, hidden = collect(make_tiny(), IMAGES)
    assert sorted(smooth(adapter.blocks[0], hidden, ["blocks.0.mlp.fc1"])) == ["blocks.0.norm2.bias", "blocks.0.norm2.weight"]


@pytest.mark.parametrize("int8", [False, True])
def test_compression_smooths_for_int8_alone(tmp_path, int8):
    """And blocks that a run goes on from bring the norms that their layers were rounded for."""
    job = job_of("mrp", MRPConfig(), int8=int8)
    model, dense = make_tiny(), make_tiny()
    compress_in_place(model, IMAGES, job, state=BlockStore(tmp_path / "state", "same", resume=False))
    assert torch.equal(model.blocks[0].norm1.weight, dense.blocks[0].norm1.weight) != int8
    store = BlockStore(tmp_path / "state", "same", resume=True)
    norms = store.load(0, [f"blocks.0.{name}" for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")])[2]
    assert len(norms) == (4 if int8 else 0)
    again = make_tiny()
    compress_in_place(again, IMAGES, job, state=store)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())


@torch.inference_mode()
def test_outliers_on_a_real_backbone():
    """The figures of docs/methods.md, on fewer images: the embedded backbone, with a channel made 100 times as large."""
    loaded = load_model("dinov2s_derived", with_head=False)
    held_out = draw_images(make_job("dinov2s_derived", nsamples=4), loaded).held_out
    images = torch.stack([kind[i][0] for kind in held_out.values() for i in range(8)])
    dense = loaded.timm_model
    outliers = copy.deepcopy(dense)
    enlarge(outliers, 100.0)
    remedied = copy.deepcopy(outliers)
    adapter = adapt(remedied, loaded.inputs)
    hidden = HiddenStates.collect(adapter, iter([images]), len(images), len(images))
    for block in adapter.blocks:
        smooth(block, hidden, [layer.name for layer in block.linears])
        hidden.advance(block)
    expected = dense(images).numpy()
    for model in (outliers, remedied):
        assert relative_error(model(images).numpy(), expected) < 1e-6
    plain, spoilt, smoothed_again = (
        relative_error(rounded(model, loaded.inputs)(images).numpy(), expected) for model in (dense, outliers, remedied)
    )
    assert spoilt > 5 * plain
    assert smoothed_again < 1.1 * plain
