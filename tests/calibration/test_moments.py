"""Calibration statistics against float64 sums over dense forward passes."""

import pytest
import torch

from tests.calibration.states import collect, inputs_in_float64
from vitoats.calibration import moments
from vitoats.calibration.hidden_states import CPU, HiddenStates
from vitoats.calibration.moments import RunningMeans, gram, input_statistics
from vitoats.calibration.walk import walk
from vitoats.common.errors import InputError
from vitoats.format.decomposition import Decomposition
from vitoats.format.layers import SparseLowRankLinear, replace_module
from vitoats.methods.statistics import InputStatistics
from vitoats.models.blocks import Block, BlockCall, LinearLayer


def test_second_moments_are_mean_squares(tiny):
    images = torch.randn(7, 3, 32, 32)
    adapter, hidden = collect(tiny, images)
    for block in walk(adapter.blocks, hidden):
        found = input_statistics(hidden, block)
        assert list(found) == [x.name for x in block.linears]
        for name, got in found.items():
            expected = inputs_in_float64(tiny, name, images).square().mean(dim=0)
            assert torch.allclose(got.second_moment, expected, rtol=1e-4), name


def test_layers_are_measured_by_name_where_not_all_are_wanted(tiny):
    adapter, hidden = collect(tiny, torch.randn(4, 3, 32, 32))
    found = input_statistics(hidden, adapter.blocks[0], layers=["blocks.0.mlp.fc2"])
    assert list(found) == ["blocks.0.mlp.fc2"]
    whole = input_statistics(hidden, adapter.blocks[0])["blocks.0.mlp.fc2"]
    assert torch.equal(found["blocks.0.mlp.fc2"].second_moment, whole.second_moment)


def test_full_second_moments_and_means(tiny):
    """Against float64 over one whole forward pass; the batches of 4 do not divide the 7 images."""
    images = torch.randn(7, 3, 32, 32)
    adapter, hidden = collect(tiny, images)
    hidden.advance(adapter.blocks[0])
    found = input_statistics(hidden, adapter.blocks[1], "full")
    assert list(found) == [x.name for x in adapter.blocks[1].linears]  # one for all of a fused qkv
    for name, got in found.items():
        expected = InputStatistics.of(inputs_in_float64(tiny, name, images))
        scale = expected.second_moment.max()
        assert got.H.dtype == got.mean.dtype == torch.float64
        assert torch.allclose(got.H, expected.H, rtol=1e-4, atol=1e-5 * scale), name
        assert torch.allclose(got.mean, expected.mean, rtol=1e-4, atol=1e-5 * scale.sqrt()), name
        assert torch.equal(got.second_moment, got.H.diagonal())


def test_the_diagonal_alone_is_collected_where_no_more_is_needed(tiny):
    adapter, hidden = collect(tiny, torch.randn(4, 3, 32, 32))
    for got in input_statistics(hidden, adapter.blocks[0]).values():
        assert got.H is None
        with pytest.raises(InputError, match='needs="full"'):
            got.full  # noqa: B018


@pytest.mark.parametrize("tokens", [20, 10**6])
def test_errors_are_measured_by_some_of_the_tokens(tiny, monkeypatch, tokens):
    """Batches of 4 and 3 images of 17 tokens: every sixth and every fifth if 20 are enough; the mean squares are of all."""
    monkeypatch.setattr(moments, "ERROR_TOKENS", tokens)
    images = torch.randn(7, 3, 32, 32)
    adapter, hidden = collect(tiny, images)
    found = input_statistics(hidden, adapter.blocks[0], for_errors=True)
    for name, got in found.items():
        x = inputs_in_float64(tiny, name, images)
        some = torch.cat([x[:68][0::6], x[68:][1::5]]) if tokens == 20 else x
        assert torch.allclose(got.second_moment, x.square().mean(dim=0), rtol=1e-4)
        assert torch.allclose(got.H, InputStatistics.of(some).H, rtol=1e-3, atol=1e-5)
        assert torch.allclose(got.mean, some.mean(dim=0), rtol=1e-3, atol=1e-5)
        assert got.diagonal().H is None


def test_later_blocks_see_the_compressed_ones(tiny):
    images = torch.randn(6, 3, 32, 32)
    adapter, hidden = collect(tiny, images)
    before = tiny.blocks[0].mlp.fc2
    part = Decomposition(before.weight.data * 0.5, torch.zeros(48, 0), torch.zeros(0, before.in_features), 0, 0, 1)
    replace_module(tiny, "blocks.0.mlp.fc2", SparseLowRankLinear.from_decompositions([part], before.bias))
    hidden.advance(adapter.blocks[0])
    moment = input_statistics(hidden, adapter.blocks[1])["blocks.1.attn.qkv"].second_moment
    expected = inputs_in_float64(tiny, "blocks.1.attn.qkv", images).square().mean(dim=0)
    assert torch.allclose(moment, expected, rtol=1e-4)


@pytest.mark.parametrize("level", ["diagonal", "full"])
def test_activations_that_are_not_finite_are_refused(tiny, level):
    tiny.blocks[1].norm1.bias.data[0] = 3e38
    tiny.blocks[1].norm1.weight.data[0] = 3e38
    adapter, hidden = collect(tiny, torch.randn(4, 3, 32, 32))
    hidden.advance(adapter.blocks[0])
    with pytest.raises(InputError, match=r"activations at blocks\.1\.attn\.qkv are not finite"):
        input_statistics(hidden, adapter.blocks[1], level)


def test_what_makes_an_mlps_neurons_is_told_what_its_output_layer_sees_of_them(tiny):
    adapter, hidden = collect(tiny, torch.randn(4, 3, 32, 32))
    found = input_statistics(hidden, adapter.blocks[0], "neurons")
    assert torch.equal(found["blocks.0.mlp.fc1"].neurons, found["blocks.0.mlp.fc2"].second_moment)
    assert all(found[f"blocks.0.{name}"].neurons is None for name in ("attn.qkv", "attn.proj", "mlp.fc2"))


@pytest.mark.parametrize("width", [3, 1024, 1300])
def test_a_gram_matrix_whose_half_is_copied_is_that_of_the_product(width):
    x = torch.randn(20, width)
    found = gram(x)
    assert torch.equal(found, found.T)
    assert torch.allclose(found.double(), x.double().T @ x.double(), atol=1e-4)


def test_running_means_are_those_of_all_tokens():
    x = torch.randn(10, 4)
    running = RunningMeans()
    for part in (x[:3], x[3:4], x[4:]):
        running.add([part.sum(dim=0), part.T @ part], len(part))
    mean, second = running.finish("layer")
    assert mean.dtype == second.dtype == torch.float64
    assert torch.allclose(mean, x.double().mean(dim=0), atol=1e-6)
    assert torch.allclose(second, x.double().T @ x.double() / 10, atol=1e-6)


class _Shared(torch.nn.Module):
    """Three layers that get one tensor, which changes in place before the third one."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (torch.nn.Linear(5, 5) for _ in range(3))

    def forward(self, x):
        x = x * 1
        found = self.a(x) + self.b(x)
        x[0, 0, 0] += 1
        return found + self.c(x)


@pytest.mark.parametrize("level", ["diagonal", "full"])
def test_an_input_of_several_layers_is_summed_once(monkeypatch, level):
    model = torch.nn.ModuleDict({"block": _Shared()})
    layers = [LinearLayer(model, f"block.{name}", 1) for name in "abc"]
    block = Block(model, "block", layers, BlockCall(), (3, 5), (3, 5))
    x, counted = torch.randn(4, 3, 5), []
    monkeypatch.setattr(moments, "exact", lambda x: counted.append(1) or x)
    found = input_statistics(HiddenStates(x, 2, CPU, None), block, level)
    assert len(counted) == 2 * 2  # for each batch, the input of a and b, and that of c
    changed = x.clone()
    changed[[0, 2], 0, 0] += 1
    for name, inputs in {"a": x, "b": x, "c": changed}.items():
        got, expected = found[f"block.{name}"], InputStatistics.of(inputs.flatten(0, 1).double())
        assert torch.allclose(got.second_moment, expected.second_moment, rtol=1e-6)
        assert level == "diagonal" or torch.allclose(got.H, expected.H, rtol=1e-6)
        assert level == "diagonal" or torch.allclose(got.mean, expected.mean, rtol=1e-6)
