"""Products that are timed: their zeros, how many copies a model holds, and that a wrong result is not timed."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitoats.benchmark.onnx_models import dense_model
from vitoats.benchmark.products import MOST_COPIES, Product, check, copies_beyond_cache, exact, product_ms, random_zeros
from vitoats.common.errors import RunError
from vitoats.common.machine import last_level_cache


@pytest.mark.parametrize("pattern", ["row", "layer"])
@pytest.mark.parametrize("zeros", [0, 50, 62.5, 90])
def test_patterns_have_the_zeros_that_they_say(pattern, zeros):
    W = np.ones((40, 48), np.float32)
    S = random_zeros(W, zeros, pattern, np.random.default_rng(0))
    assert np.count_nonzero(S == 0) == pytest.approx(zeros / 100 * S.size, abs=0.5 if pattern == "layer" else 20)
    counts = np.count_nonzero(S, axis=1)
    assert (len(set(counts)) == 1) == (pattern == "row" or zeros == 0)
    assert W.all()


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 5000), st.sampled_from([1, 4]))
def test_copies_fill_the_cache_twice_and_no_more_than_that(n, k, tokens, weight_bytes):
    copies, one = copies_beyond_cache(n, k, tokens, weight_bytes), weight_bytes * n * k + 4 * tokens * (n + k)
    assert 1 <= copies <= MOST_COPIES
    assert copies * one >= 2 * last_level_cache() or copies == MOST_COPIES
    assert (copies - 1) * one < 2 * last_level_cache()


@pytest.mark.parametrize("wrong", [2.0, np.nan])
def test_a_wrong_kernel_has_no_speed(wrong):
    x = np.ones((1, 1, 5), np.float32)
    y = np.ones((1, 1, 3), np.float32)
    check(y.ravel(), x, y, 1e-4)
    with pytest.raises(RunError, match="3 x 5"):
        check(y.ravel(), x, wrong * y, 1e-4)


def test_every_product_is_checked():
    W = np.random.default_rng(0).standard_normal((8, 8), np.float32)
    x = np.ones((1, 2, 8), np.float32)
    right = Product(dense_model(W, 2), 2, exact(x, W))
    times = product_ms(iter([right, right]), x, 1)
    assert len(times) == 2
    assert all(ms > 0 for ms in times)
    with pytest.raises(RunError):
        product_ms([right, Product(dense_model(2 * W, 2), 2, exact(x, W))], x, 1)
