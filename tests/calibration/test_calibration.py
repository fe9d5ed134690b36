"""Calibration statistics against float64 sums over dense forward passes, the compressed prefix, and memory."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vitoats.calibration.hidden_states import HiddenStates
from vitoats.common.errors import InputError
from vitoats.format.layers import SparseLowRankLinear, replace_module
from vitoats.methods.registry import Decomposition
from vitoats.methods.statistics import InputStatistics
from vitoats.models.adapter import adapt

import timm  # isort: skip


def collect(model, images, batch_size=4, **kwargs):
    adapter = adapt(model, 32)
    return adapter, HiddenStates.collect(adapter, iter(images.split(3)), len(images), batch_size, **kwargs)


def inputs_in_float64(model, name, images):
    caught = []
    model = model.double()
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _m, args: caught.append(args[0]))
    with torch.inference_mode():
        model(images.double())
    handle.remove()
    model.float()
    return caught[0].reshape(-1, caught[0].shape[-1])


@pytest.mark.parametrize("block", [0, 1, 2])
def test_second_moments_are_mean_squares(tiny, block):
    images = torch.randn(7, 3, 32, 32)
    adapter, hidden = collect(tiny, images)
    for i in range(block):
        hidden.advance(adapter, i)
    moments = {n: s.second_moment for n, s in hidden.statistics(adapter, block, adapter.linears[block]).items()}
    assert list(moments) == [x.name for x in adapter.linears[block]]
    for name, moment in moments.items():
        expected = inputs_in_float64(tiny, name, images).square().mean(dim=0)
        assert torch.allclose(moment, expected, rtol=1e-4), name


def test_full_second_moments_and_means(tiny):
    """Against float64 over one whole forward pass; the batches of 4 do not divide the 7 images."""
    images = torch.randn(7, 3, 32, 32)
    adapter, hidden = collect(tiny, images)
    hidden.advance(adapter, 0)
    found = hidden.statistics(adapter, 1, adapter.linears[1], "full")
    assert list(found) == [x.name for x in adapter.linears[1]]  # one for all of a fused qkv
    for name, got in found.items():
        expected = InputStatistics.of(inputs_in_float64(tiny, name, images))
        scale = expected.second_moment.max()
        assert got.H.dtype == got.mean.dtype == torch.float64
        assert torch.allclose(got.H, expected.H, rtol=1e-4, atol=1e-5 * scale), name
        assert torch.allclose(got.mean, expected.mean, rtol=1e-4, atol=1e-5 * scale.sqrt()), name
        assert torch.equal(got.second_moment, got.H.diagonal())


def test_the_diagonal_alone_is_collected_where_no_more_is_needed(tiny):
    adapter, hidden = collect(tiny, torch.randn(4, 3, 32, 32))
    for got in hidden.statistics(adapter, 0, adapter.linears[0]).values():
        assert got.H is None
        with pytest.raises(InputError, match='needs="full"'):
            got.full  # noqa: B018


def test_later_blocks_see_the_compressed_ones(tiny):
    images = torch.randn(6, 3, 32, 32)
    adapter, hidden = collect(tiny, images)
    before = tiny.blocks[0].mlp.fc2
    part = Decomposition(before.weight.data * 0.5, torch.zeros(48, 0), torch.zeros(0, before.in_features), 0, 0, 1)
    replace_module(tiny, "blocks.0.mlp.fc2", SparseLowRankLinear.from_decompositions([part], before.bias))
    hidden.advance(adapter, 0)
    moment = hidden.statistics(adapter, 1, adapter.linears[1])["blocks.1.attn.qkv"].second_moment
    expected = inputs_in_float64(tiny, "blocks.1.attn.qkv", images).square().mean(dim=0)
    assert torch.allclose(moment, expected, rtol=1e-4)


def test_a_mapped_file_gives_the_same_bits_and_disappears(tiny, tmp_path):
    images = torch.randn(6, 3, 32, 32)
    adapter, in_memory = collect(tiny, images)
    _, mapped = collect(tiny, images, spill_to=tmp_path)
    assert not list(tmp_path.iterdir())  # unlinked while in use, so that nothing can leave it behind
    for i in range(3):
        in_memory.advance(adapter, i)
        mapped.advance(adapter, i)
    assert torch.equal(in_memory.values, mapped.values)


SWIN = {"embed_dim": 24, "depths": (1, 1), "num_heads": (2, 4), "window_size": 4, "img_size": 32, "num_classes": 4}


@pytest.mark.parametrize("spill", [False, True])
def test_hidden_states_that_change_their_shape(tmp_path, spill):
    """Swin: 8 x 8 x 24, then 4 x 4 x 48. The second moments after it are those of whole forward passes."""
    model = timm.create_model("swin_tiny_patch4_window7_224", **SWIN).eval()
    images = torch.randn(7, 3, 32, 32)
    adapter, hidden = collect(model, images, spill_to=tmp_path if spill else None)
    assert adapter.hidden_shapes == [(8, 8, 24), (8, 8, 24), (4, 4, 48), (4, 4, 48)]
    for i in range(2):
        hidden.advance(adapter, i)
    assert hidden.values.shape == (7, 4, 4, 48)
    assert not list(tmp_path.iterdir())
    found = hidden.statistics(adapter, 2, adapter.linears[2])
    for name, got in found.items():
        expected = inputs_in_float64(model, name, images).square().mean(dim=0)
        assert torch.allclose(got.second_moment, expected, rtol=1e-4), name


@pytest.mark.parametrize("needs", ["diagonal", "full"])
def test_activations_that_are_not_finite_are_refused(tiny, needs):
    tiny.blocks[1].norm1.bias.data[0] = 1e30
    tiny.blocks[1].norm1.weight.data[0] = 1e30
    adapter, hidden = collect(tiny, torch.randn(4, 3, 32, 32))
    hidden.advance(adapter, 0)
    with pytest.raises(InputError, match=r"activations at blocks\.1\.attn\.qkv are not finite"):
        hidden.statistics(adapter, 1, adapter.linears[1], needs)


def test_no_room_for_the_mapped_file_is_an_error_not_a_signal(tmp_path):
    """A real limit on file size stands in for a full disk."""
    code = f"""
import resource
from pathlib import Path
from vitoats.calibration.hidden_states import _allocate
from vitoats.common.errors import RunError
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
try:
    _allocate((1000, 1000), Path({str(tmp_path)!r}))
except RunError as error:
    assert "`nsamples`" in str(error), error
    print("refused")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent.parent.parent)
    assert done.stdout == "refused\n", done.stderr
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY  # only the child was limited
