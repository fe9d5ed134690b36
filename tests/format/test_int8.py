"""Rounding of weights and tokens to int8, against restatements in NumPy that follow the definition number by number."""

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from vitoats.format.int8 import balanced, dequantized, fake_quantized, quantize_tokens, round_rows

anything = st.floats(-(2.0**126), 2.0**126, width=32)
usual = st.floats(-4, 4, width=32)
shapes = st.tuples(st.integers(1, 5), st.integers(1, 9))
matrices = hnp.arrays(np.float32, shapes, elements=usual) | hnp.arrays(np.float32, shapes, elements=anything)


def token_by_hand(v: np.ndarray) -> tuple[list[int], np.float32, int]:
    """One token, in float32."""
    one, share = np.float32(1), np.float32(1 / 255)
    low, high = min(np.float32(0), v.min()), max(np.float32(0), v.max())
    scale = np.float32(high * share) - np.float32(low * share)
    if scale < np.finfo(np.float32).tiny:
        return [0] * len(v), np.float32(0), 0
    inverse = one / scale
    zero = np.rint(-low * inverse)
    return [int(np.clip(np.rint(x * inverse) + zero, 0, 255)) for x in v], scale, int(zero)


@given(x=matrices)
@example(x=np.zeros((1, 3), np.float32))
@example(x=np.full((2, 3), 1e-42, np.float32))
@example(x=np.array([[-3, -1.0]], np.float32))
@example(x=np.array([[5, 7.0]], np.float32))
def test_tokens_by_hand(x):
    q, scale, zero = quantize_tokens(torch.from_numpy(x))
    assert (q.dtype, scale.dtype) == (torch.uint8, torch.float32)
    for n, token in enumerate(x):
        expected, its_scale, its_zero = token_by_hand(token)
        assert (q[n].tolist(), scale[n].item(), zero[n].item()) == (expected, its_scale, its_zero)


@given(x=matrices)
def test_a_token_is_off_by_half_a_step_at_most_and_zero_stays_zero(x):
    x = torch.from_numpy(x)
    scale = quantize_tokens(x)[1]
    near = fake_quantized(x)
    tiny = 255 * torch.finfo(torch.float32).tiny  # a token of such numbers counts as zero
    assert ((near - x).abs() <= 0.51 * scale + tiny).all()
    assert (near[x == 0] == 0).all()


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_a_token_that_is_not_finite_is_nan_and_spoils_no_other(bad):
    x = torch.randn(4, 6)
    expected = fake_quantized(x)
    x[2, 3] = bad
    found = fake_quantized(x)
    assert found[2].isnan().all()
    assert torch.equal(found[[0, 1, 3]], expected[[0, 1, 3]])


def test_tokens_of_any_type_and_shape():
    x = torch.randn(2, 3, 5, 7, dtype=torch.float64)
    near = fake_quantized(x)
    assert (near.shape, near.dtype) == (x.shape, torch.float64)
    assert torch.equal(near[1, 2, 4], fake_quantized(x[1, 2, 4]))


@given(W=matrices)
@example(W=np.zeros((2, 3), np.float32))
@example(W=np.array([[1e-42, 0], [2, 2]], np.float32))
def test_rows_by_hand(W):
    q, scale = round_rows(torch.from_numpy(W))
    assert (q.dtype, scale.dtype) == (torch.int8, torch.float32)
    for row, found, its_scale in zip(W, q.numpy(), scale.numpy(), strict=True):
        largest = np.float32(np.abs(row).max())
        if largest / np.float32(127) < np.finfo(np.float32).tiny:
            assert its_scale == 1
            assert not found.any()
            continue
        assert its_scale == np.float32(largest / np.float32(127))
        assert np.abs(found.astype(int)).max() == 127
        assert (np.abs(found * np.float64(its_scale) - row) <= 0.5001 * np.float64(its_scale)).all()


def test_a_row_of_one_value_is_kept_exactly():
    W = torch.tensor([[0.3] * 4, [-7.0] * 4])
    q, scale = round_rows(W)
    assert q.tolist() == [[127] * 4, [-127] * 4]
    assert torch.allclose(dequantized(q, scale), W, rtol=1e-6)


def test_a_matrix_without_columns():
    q, scale = round_rows(torch.zeros(3, 0))
    assert (q.shape, scale.tolist()) == ((3, 0), [1, 1, 1])


@given(rank=st.integers(0, 7), seed=st.integers(0, 50))
def test_balanced_factors_have_the_same_product_and_equal_shares(rank, seed):
    torch.manual_seed(seed)
    U, V = 100 * torch.randn(6, rank, dtype=torch.float64), 0.01 * torch.randn(rank, 8, dtype=torch.float64)
    u, v = balanced(U, V)
    assert torch.allclose(u @ v, U @ V, atol=1e-12)
    assert torch.allclose(u.T @ u, v @ v.T, atol=1e-12)  # both diagonal, of the singular values
    assert torch.allclose(u.T @ u, (u.T @ u).diagonal().diag(), atol=1e-12)
