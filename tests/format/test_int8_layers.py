"""Layers with int8 weights: their products against integer arithmetic as the operator does it, and their counts."""

import numpy as np
import pytest
import torch
from torch import nn

from tests.format.test_layers import make
from vitoats.common.errors import InputError
from vitoats.format.int8 import quantize_tokens
from vitoats.format.int8_layers import Int8Linear, Int8SparseLowRankLinear, to_int8
from vitoats.format.layers import compressed_counts, compressed_layers, parameter_count

PARTS = [[(12, 3)], [(8, 2), (8, 2), (8, 2)], [(6, 1), (4, 3)], [(10, 0)], [(5, 0), (5, 0)]]
IDS = ["one", "fused qkv", "uneven", "no low rank", "fused, no low rank"]


def int8_layer(parts, d_in=16, bias=True) -> Int8SparseLowRankLinear:
    made = to_int8(make(parts, d_in, bias).float())
    assert isinstance(made, Int8SparseLowRankLinear)
    return made


def integer_product(x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor) -> np.ndarray:
    """x [n, k] quantized, times int8 weights [m, k]: the sum is an exact integer."""
    q, scale, zero = quantize_tokens(x)
    sums = (q.numpy().astype(np.int64) - zero.numpy().astype(np.int64)) @ weight.numpy().astype(np.int64).T
    return weight_scale.numpy().astype(np.float64) * scale.numpy().astype(np.float64) * sums


@pytest.mark.parametrize("parts", PARTS, ids=IDS)
@pytest.mark.parametrize("bias", [True, False])
def test_forward_is_the_operators_arithmetic(parts, bias):
    layer, x = int8_layer(parts, bias=bias), torch.randn(2, 7, 16)
    tokens = x.reshape(-1, 16)
    expected = integer_product(tokens, layer.S_int8, layer.S_scale)
    low_rank = []
    for u, u_scale, v, v_scale in zip(layer.U_int8, layer.U_scale, layer.V_int8, layer.V_scale, strict=True):
        if v.numel():
            z = integer_product(tokens, v, v_scale).astype(np.float32)
            low_rank.append(integer_product(torch.from_numpy(z), u, u_scale))
    expected = expected + (np.concatenate(low_rank, axis=1) if low_rank else 0)
    expected = expected + (layer.bias.numpy() if bias else 0)
    found = layer(x).reshape(-1, layer.out_features).numpy()
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("bias", [True, False])
def test_forward_of_a_dense_layer_is_the_operators_arithmetic(bias):
    dense = nn.Linear(16, 6, bias=bias).requires_grad_(False)
    layer, x = to_int8(dense), torch.randn(5, 16)
    assert isinstance(layer, Int8Linear)
    expected = integer_product(x, layer.weight_int8, layer.weight_scale) + (dense.bias.numpy() if bias else 0)
    assert np.abs(layer(x).numpy() - expected).max() < 1e-5
    assert (layer(x) - dense(x)).norm() < 0.02 * dense(x).norm()
    assert torch.equal(layer.folded().weight, layer.weight)


@pytest.mark.parametrize("parts", PARTS, ids=IDS)
def test_rounding_a_finished_layer_keeps_its_support_and_its_weights(parts):
    layer = make(parts, 16, True).float()
    rounded = to_int8(layer)
    assert isinstance(rounded, Int8SparseLowRankLinear)
    assert not rounded.S_int8[layer.S == 0].any()
    assert rounded.parts == layer.parts
    assert (rounded.weight - layer.weight).norm() < 0.02 * layer.weight.norm()
    assert torch.equal(rounded.folded().weight, rounded.weight)
    assert torch.equal(rounded.bias, layer.bias)


def test_a_row_of_zeros_stays_zero():
    layer = make([(4, 0)], 8, False).float()
    layer.S[1] = 0
    rounded = to_int8(layer)
    assert (rounded.S_scale[1], rounded.S_int8[1].any()) == (1, False)


def test_a_token_that_is_not_finite_is_nan_and_spoils_no_other():
    layer, x = int8_layer([(8, 2)]), torch.randn(3, 16)
    expected = layer(x)
    x[1, 4] = float("inf")
    found = layer(x)
    assert found[1].isnan().all()
    assert torch.equal(found[[0, 2]], expected[[0, 2]])


def test_weights_that_are_not_finite_are_refused():
    for layer in (make([(4, 1)], 8, True), nn.Linear(8, 4).requires_grad_(False)):
        next(iter(layer.parameters()))[0, 0] = float("nan")
        with pytest.raises(InputError, match="not finite"):
            to_int8(layer)


def test_counting_by_hand():
    layer = int8_layer([(8, 2), (8, 3)])
    nonzeros = int((layer.S_int8 != 0).sum())
    assert layer.kept_parameters == nonzeros + 2 * (8 + 16) + 3 * (8 + 16)
    model = nn.Sequential(layer, to_int8(nn.Linear(16, 4, bias=False).requires_grad_(False)))
    assert parameter_count(model) == layer.kept_parameters + 16 + 64  # bias, and a dense layer; no scales
    assert compressed_layers(model) == {"0": layer}
    assert compressed_counts(model) == {"nnz": nonzeros, "rank_params": 5 * 24}


def test_a_model_with_int8_layers_is_copied_moved_and_stored_like_any_other():
    model = nn.Sequential(int8_layer([(8, 2), (8, 2)]), to_int8(nn.Linear(16, 4).requires_grad_(False)))
    model.requires_grad_(False).double()
    assert model[0].S_int8.dtype == torch.int8
    other = nn.Sequential(int8_layer([(8, 2), (8, 2)]), to_int8(nn.Linear(16, 4).requires_grad_(False))).double()
    other.load_state_dict(model.state_dict())
    x = torch.randn(3, 16)
    assert torch.equal(model(x.double()), other(x.double()))
