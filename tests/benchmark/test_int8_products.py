"""Products of the native int8 operators: what they should give, recomputed in whole numbers, and what their models hold."""

import numpy as np
import pytest

from tests.runtime.sparse_models import random_low_rank, random_sparse
from vitoats.benchmark.int8_products import dense_layer, expected, int8_layer_model, int8_product, sparse_layer
from vitoats.benchmark.products import product_ms

N, K = 32, 40


def quantized(v):
    """A token in whole numbers without its zero point, and its scale, as docs/formats.md has it."""
    low, high = np.float32(min(0, v.min())), np.float32(max(0, v.max()))
    scale = high * np.float32(1 / 255) - low * np.float32(1 / 255)
    inverse = np.float32(1) / scale
    zero = np.rint(-low * inverse)
    return (np.clip(np.rint(v * inverse) + zero, 0, 255) - zero).astype(np.int64), scale


@pytest.fixture
def random():
    return np.random.default_rng(0)


@pytest.mark.parametrize("parts", [1, 2])
def test_a_sparse_product_is_one_of_whole_numbers(random, parts):
    S, low_rank = random_sparse(random, N, K, 0.7), random_low_rank(random, N, K, parts, 3)
    x = random.standard_normal((2, 5, K), np.float32)
    layer = sparse_layer(S, low_rank)
    q, scale = quantized(x[0, 0])
    y = layer.S_scale.numpy() * scale * (layer.S_int8.numpy().astype(np.int64) @ q).astype(np.float64)
    for part in range(parts):
        u, v = (term[part].numpy().astype(np.int64) for term in (layer.U_int8, layer.V_int8))
        z, z_scale = quantized((layer.V_scale[part].numpy() * scale * (v @ q)).astype(np.float32))
        y[part * N // parts : (part + 1) * N // parts] += layer.U_scale[part].numpy() * z_scale * (u @ z)
    found = expected(layer, x)
    assert np.abs(found - y).max() < 2e-3 * np.abs(y).max()
    assert np.abs(found - x[0, 0] @ (S + (low_rank[0] @ low_rank[1]).reshape(N, K)).T).max() < 0.05 * np.abs(y).max()


def test_a_dense_product_is_one_of_whole_numbers(random):
    W, x = random.standard_normal((N, K), np.float32), random.standard_normal((1, 3, K), np.float32)
    layer = dense_layer(W)
    q, scale = quantized(x[0, 0])
    y = layer.weight_scale.numpy() * scale * (layer.weight_int8.numpy().astype(np.int64) @ q)
    assert np.allclose(expected(layer, x), y, rtol=1e-5, atol=1e-6)


def test_no_two_copies_are_alike(random):
    """Of equal weights ONNX Runtime keeps one, and they would not come from memory."""
    S = random_sparse(random, N, K, 0.5)
    for layer in (dense_layer(S), sparse_layer(S), sparse_layer(S, random_low_rank(random, N, K, 2, 3))):
        model = int8_layer_model(layer, 3)
        names = ("weight", "values", "mask") + (("U", "V") if getattr(layer, "rank", 0) else ())
        weights = [t.raw_data for t in model.graph.initializer if t.name.rstrip("012") in names]
        assert len(weights) >= 3
        assert len(set(weights)) == len(weights)


@pytest.mark.parametrize("copies", [1, 3])
def test_the_native_operators_give_what_they_should(random, copies):
    x = random.standard_normal((2, 5, K), np.float32)
    S = random_sparse(random, N, K, 0.7)
    layers = dense_layer(S), sparse_layer(S), sparse_layer(S, random_low_rank(random, N, K, 2, 3))
    assert len(product_ms([int8_product(layer, x, copies) for layer in layers], x, 1)) == 3
