"""The little models of one product compute it, and read other weights for each copy."""

import math

import numpy as np
import pytest

from tests.runtime.sparse_models import random_low_rank, random_sparse
from vitoats.benchmark.onnx_models import dense_model, int8_model, sparse_model
from vitoats.benchmark.products import open_model

N, K = 24, 40


def run(model, x):
    return open_model(model, 1).run(None, {"x": x})


@pytest.fixture
def random():
    return np.random.default_rng(0)


@pytest.fixture
def x(random):
    return random.standard_normal((2, 5, K), np.float32)


@pytest.mark.parametrize("copies", [1, 3, N + 2])  # the last: more than there are rows to shift by
def test_all_models_compute_the_same_product(copies, random, x):
    W = random.standard_normal((N, K), np.float32) / math.sqrt(K)
    expected = x @ W.T
    for model, tolerance in (
        (dense_model(W, copies), 1e-5),
        (sparse_model(W, copies), 1e-5),
        (sparse_model(W, copies, float16=True), 1e-3),
        (int8_model(W, copies), 0.05),
    ):
        outputs = run(model, x)
        assert np.abs(outputs[0] - expected).max() < tolerance * np.abs(expected).max()
        if copies > 1:
            assert outputs[1].shape == (copies - 1, 1, 1)


@pytest.mark.parametrize("parts", [1, 3])
def test_a_low_rank_term_is_added(parts, random, x):
    S = random_sparse(random, N, K, 0.7)
    U, V = random_low_rank(random, N, K, parts, 2)
    expected = x @ (S + (U @ V).reshape(N, K)).T
    assert np.allclose(run(sparse_model(S, 2, low_rank=(U, V)), x)[0], expected, atol=1e-4)


def test_no_two_copies_are_alike(random):
    """Of equal weights ONNX Runtime keeps one, and they would not come from memory."""
    W, S = random.standard_normal((N, K), np.float32), random_sparse(random, N, K, 0.5)
    low_rank = random_low_rank(random, N, K, 3, 2)
    for model in (dense_model(W, 3), int8_model(W, 3), sparse_model(S, 3), sparse_model(S, 3, low_rank=low_rank)):
        weights = [t.raw_data for t in model.graph.initializer if t.name.startswith(("w", "values", "mask", "U", "V"))]
        assert len(weights) >= 3
        assert len(set(weights)) == len(weights)
