"""The compressed layer computes what its dense matrix computes, in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vitoats.format.layers import SparseLowRankLinear, compressed_layers, parameter_count, replace_module


def make(parts, d_in: int, bias: bool) -> SparseLowRankLinear:
    d_out = sum(rows for rows, _ in parts)
    S = torch.randn(d_out, d_in, dtype=torch.float64) * (torch.rand(d_out, d_in) > 0.6)
    U = [torch.randn(rows, rank, dtype=torch.float64) for rows, rank in parts]
    V = [torch.randn(rank, d_in, dtype=torch.float64) for _, rank in parts]
    return SparseLowRankLinear(S, U, V, torch.randn(d_out, dtype=torch.float64) if bias else None)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "parts",
    [[(12, 3)], [(8, 2), (8, 2), (8, 2)], [(6, 1), (4, 3)], [(10, 0)], [(5, 0), (5, 0)]],
    ids=["one", "fused qkv", "uneven", "no low rank", "fused, no low rank"],
)
@pytest.mark.parametrize("tokens", [1, 5, 50], ids=["one token", "few tokens", "many, for which U V is added to S"])
def test_forward_is_the_dense_product(parts, bias, tokens):
    layer = make(parts, 16, bias)
    x = torch.randn(2, tokens, 16, dtype=torch.float64)
    start, dense = 0, layer.S.clone()
    for u, v in zip(layer.U, layer.V, strict=True):
        dense[start : start + len(u)] += u @ v
        start += len(u)
    expected = x @ dense.T + (layer.bias if bias else 0)
    assert torch.allclose(layer(x), expected, rtol=1e-12)
    assert torch.allclose(layer.weight, dense, rtol=1e-12)
    assert torch.allclose(layer.folded()(x), expected, rtol=1e-12)


def test_counting_by_hand():
    layer = make([(8, 2), (8, 3)], 16, bias=True)
    nonzeros = int((layer.S != 0).sum())
    assert layer.nonzeros == nonzeros
    assert layer.kept_parameters == nonzeros + 2 * (8 + 16) + 3 * (8 + 16)
    assert layer.rank == 5
    model = nn.Sequential(layer, nn.Linear(16, 4, bias=False))
    assert parameter_count(model) == layer.kept_parameters + 16 + 64


def test_replacing_by_name():
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 4))
    layer = make([(4, 1)], 4, bias=True)
    replace_module(model, "0.0", layer)
    assert compressed_layers(model) == {"0.0": layer}


@pytest.mark.parametrize("tokens", [1, 50], ids=["few tokens", "many, for which U V is added to S"])
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_training_changes_the_values_and_keeps_the_zeros(tokens, optimizer):
    layer = make([(8, 2), (8, 2)], 16, bias=True).requires_grad_(True)
    before, terms = layer.S.detach().clone(), [u.detach().clone() for u in layer.U]
    x = torch.randn(tokens, 16, dtype=torch.float64)
    dense = layer.weight.detach().requires_grad_(True)
    F.linear(x, dense, layer.bias.detach()).square().sum().backward()
    layer(x).square().sum().backward()
    assert torch.allclose(layer.S.grad, dense.grad * (before != 0))  # the exact gradient, on the support
    optimizer(layer.parameters(), lr=0.01, weight_decay=0.1).step()
    assert torch.equal(layer.S != 0, before != 0)
    assert (layer.S[before != 0] != before[before != 0]).all()
    assert all(not torch.equal(u, old) for u, old in zip(layer.U, terms, strict=True))
