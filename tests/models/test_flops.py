"""Proves the count of multiply-adds against counts by hand."""

import pytest
import timm
import torch

from tests.conftest import make_tiny
from vitoats.format.layers import SparseLowRankLinear, replace_module
from vitoats.models.flops import count_flops
from vitoats.models.inputs import ImageInputs


def by_hand(pixels, patch, d, depth, classes):
    """Products of a plain ViT, and five for each element of a layer norm."""
    n = (pixels // patch) ** 2 + 1
    embedding = (n - 1) * 3 * patch**2 * d
    linears = n * 12 * d * d  # qkv 3, proj 1, fc1 4, fc2 4
    attention = 2 * n * n * d  # q k^T, and its product with v
    norms = 2 * 5 * n * d
    return embedding + depth * (linears + attention + norms) + 5 * n * d + d * classes


@pytest.mark.parametrize("fused", [True, False])
def test_tiny(tiny, fused):
    for block in tiny.blocks:
        block.attn.fused_attn = fused
    assert count_flops(tiny, ImageInputs(32)) == by_hand(32, 8, 48, 3, 4)


def test_vit_base():
    model = timm.create_model("vit_base_patch16_224", weight_init="skip").eval()
    assert (
        count_flops(model, ImageInputs(224)) == by_hand(224, 16, 768, 12, 1000) == pytest.approx(17.58e9, rel=1e-3)
    )  # as published


@pytest.mark.parametrize("ranks", [[0], [5], [2, 0, 3]])
def test_a_compressed_layer_counts_its_kept_parameters_for_each_token(tiny, ranks):
    linear = tiny.blocks[1].attn.qkv
    S = linear.weight.data * (torch.rand(144, 48) < 0.3)
    rows = 144 // len(ranks)
    U, V = [torch.randn(rows, r) for r in ranks], [torch.randn(r, 48) for r in ranks]
    replace_module(tiny, "blocks.1.attn.qkv", SparseLowRankLinear(S, U, V, linear.bias))
    kept = int((S != 0).sum()) + sum(r * (rows + 48) for r in ranks)
    tokens = 17
    assert count_flops(tiny, ImageInputs(32)) == by_hand(32, 8, 48, 3, 4) - tokens * (144 * 48 - kept)


def test_counting_changes_nothing():
    tiny, images = make_tiny(), torch.randn(2, 3, 32, 32)
    before = tiny(images)
    count_flops(tiny, ImageInputs(32))
    assert torch.equal(tiny(images), before)
