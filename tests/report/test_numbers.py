"""The numbers of the page against independent computations."""

import numpy as np
import pytest
import torch
from torch import nn

from tests.conftest import make_tiny
from vitoats.format.layers import SparseLowRankLinear, compressed_layers, replace_module
from vitoats.loading.checkpoint import load_checkpoint
from vitoats.methods.oats import OATSConfig
from vitoats.methods.registry import get_method
from vitoats.methods.statistics import InputStatistics
from vitoats.report.page.attention import LOW_RANK, SPARSE, attention_maps, attention_of, correlation, rollout, with_one_term
from vitoats.report.page.convergence import errors_by_iterations, inputs_to
from vitoats.report.page.sources import Layer
from vitoats.report.page.weights import chosen_layers, singular_values, support_density, terms_of


def random_layer(d_out=12, d_in=10, rank=2, parts=3):
    """A layer of several parts with a sparse term."""
    S = torch.randn(d_out, d_in) * (torch.rand(d_out, d_in) < 0.3)
    U = [torch.randn(d_out // parts, rank) for _ in range(parts)]
    V = [torch.randn(rank, d_in) for _ in range(parts)]
    return SparseLowRankLinear(S, U, V, torch.randn(d_out))


def test_singular_values_are_roots_of_the_eigenvalues_of_the_gram_matrix():
    layer, W = random_layer(), torch.randn(12, 10)
    found = singular_values(terms_of(layer, "a", W))
    largest = np.linalg.eigvalsh((W @ W.T).double().numpy())[-1] ** 0.5
    UV = np.concatenate([(u.double() @ v.double()).numpy() for u, v in zip(layer.U, layer.V, strict=True)])
    for key, M in (("W", W.double().numpy()), ("S", layer.S.double().numpy()), ("UV", UV)):
        roots = np.sqrt(np.clip(np.linalg.eigvalsh(M.T @ M), 0, None))[::-1] / largest
        np.testing.assert_allclose(found[key], roots[: len(found[key])], atol=1e-5)
        assert all(roots[len(found[key]) :] < 1e-4)
    assert len(found["UV"]) == 6


def test_a_transposed_weight_is_turned():
    layer, W = random_layer(), torch.randn(10, 12)
    assert torch.equal(terms_of(layer, "a", W).W, W.T)
    assert terms_of(layer, "a", torch.randn(3, 4)).W is None


def test_the_picture_of_a_support_has_its_density():
    S = torch.zeros(8, 6)
    S[:4, :3] = 1
    S[4, 4] = 2
    assert support_density(S, 2, 2).tolist() == [[1.0, 0.0], [0.0, pytest.approx(1 / 12)]]
    assert np.array_equal(support_density(S), (S != 0).numpy())  # smaller than the grid
    big = (torch.rand(300, 400) < 0.2).float()
    assert support_density(big, 100, 100).mean() == pytest.approx(float(big.mean()), abs=1e-6)


def test_rollout_is_a_sum_over_all_paths():
    """An independent restatement: R[i, j] sums over the tokens of all blocks, one loop for each."""
    torch.manual_seed(1)
    attention = [torch.rand(1, 2, 3, 3).softmax(dim=-1) for _ in range(3)]
    R = rollout(attention)[0]
    mixed = [(a[0].mean(dim=0) + torch.eye(3)) / 2 for a in attention]
    for i in range(3):
        for j in range(3):
            total = sum(mixed[2][i, a] * mixed[1][a, b] * mixed[0][b, j] for a in range(3) for b in range(3))
            assert float(R[i, j]) == pytest.approx(float(total), abs=1e-6)
    assert torch.allclose(R.sum(dim=1), torch.ones(3))


def test_attention_is_that_of_the_model():
    model, images = make_tiny(), torch.randn(2, 3, 32, 32)
    before = model(images)
    found = attention_of(model, images)
    assert torch.allclose(model(images), before)
    assert [tuple(a.shape) for a in found] == [(2, 3, 17, 17)] * 3
    block = model.blocks[0].attn
    x = model.blocks[0].norm1(model._pos_embed(model.patch_embed(images)))
    q, k, _ = block.qkv(x).reshape(2, 17, 3, 3, 16).permute(2, 0, 3, 1, 4)
    assert torch.allclose(found[0], (q @ k.transpose(-2, -1) / 4).softmax(dim=-1), atol=1e-5)
    assert attention_maps(model, images).shape == (2, 4, 4)


def test_a_model_with_one_term_computes_with_that_alone():
    model, layer = nn.Sequential(nn.Linear(10, 12)), random_layer()
    replace_module(model, "0", layer)
    x = torch.randn(5, 10)
    sparse, low_rank = (with_one_term(model, term) for term in (SPARSE, LOW_RANK))
    whole = model(x)
    assert torch.allclose(sparse(x), x @ layer.S.T + layer.bias, atol=1e-5)
    assert torch.allclose(sparse(x) + low_rank(x) - layer.bias, whole, atol=1e-4)
    assert list(compressed_layers(model)) == ["0"]


def test_correlation_is_pearsons():
    x, y = np.random.default_rng(0).random((2, 50))
    assert correlation(x, y) == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert correlation(x, np.ones(50)) == 0.0


def test_layers_to_look_into_are_those_of_the_middle_block():
    layers = [Layer(f"blocks.{i}.{kind}", 0.5, 0.1, 1, 1) for i in range(3) for kind in ("a", "b")]
    assert chosen_layers(layers, []) == ["blocks.1.a", "blocks.1.b"]
    assert chosen_layers(layers, ["blocks.0.b", "blocks.0.b"]) == ["blocks.0.b"]


def test_the_curve_ends_where_the_method_does():
    W, X = torch.randn(24, 16), torch.randn(200, 16)
    statistics = InputStatistics.of(X)
    config = OATSConfig(compression=0.5, rank_ratio=0.25, iterations=20, tolerance=0.0)
    curve = errors_by_iterations(get_method("oats"), W, statistics, config)
    assert list(curve) == [1, 2, 4, 8, 16, 20]
    solved = get_method("oats").solve(W, statistics.diagonal(), config)
    D = (X.double().square().mean(dim=0)).sqrt()
    error = ((W - solved.S - solved.U @ solved.V).double() * D).norm() / (W.double() * D).norm()
    assert curve[20] == pytest.approx(float(error), rel=1e-4)
    assert curve[20] <= curve[1]


def test_inputs_of_a_layer_are_what_it_is_called_with(plain):
    model = load_checkpoint(plain).timm_model
    images = torch.randn(2, 3, 32, 32)
    X = inputs_to(model, "blocks.1.mlp.fc1", lambda: model(images))
    assert X.shape == (2 * 17, 48)
    before = model.blocks[0](model._pos_embed(model.patch_embed(images)))
    after = model.blocks[1].norm2(before + model.blocks[1].attn(model.blocks[1].norm1(before)))
    assert torch.allclose(X, after.reshape(-1, 48), atol=1e-5)
