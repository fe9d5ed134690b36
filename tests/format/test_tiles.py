"""The order of int8 weights in exported files: its definition, entry by entry, and back."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitoats.common.errors import InputError
from vitoats.format.tiles import pack, tiled, unpack, untiled

SIZES = st.integers(1, 70)


def random_int8(seed: int, shape: tuple[int, ...], zeros: float = 0.5) -> np.ndarray:
    random = np.random.default_rng(seed)
    return (random.integers(-128, 128, shape) * (random.random(shape) >= zeros)).astype(np.int8)


@given(seed=st.integers(0, 10**6), n=SIZES, k=SIZES)
def test_each_entry_is_where_the_format_says(seed, n, k):
    matrix = random_int8(seed, (n, k))
    tiles = tiled(matrix)
    assert tiles.shape == (-(-n // 16), -(-k // 4), 16, 4)
    assert tiles.flags.c_contiguous
    for s, q, j, i in np.ndindex(tiles.shape):
        row, column = 16 * s + j, 4 * q + i
        assert tiles[s, q, j, i] == (matrix[row, column] if row < n and column < k else 0)


@given(seed=st.integers(0, 10**6), parts=st.integers(1, 3), n=SIZES, k=SIZES)
def test_untiled_restores_a_stack_of_matrices(seed, parts, n, k):
    stack = random_int8(seed, (parts, n, k))
    assert np.array_equal(tiled(stack), np.stack([tiled(matrix) for matrix in stack]))
    assert np.array_equal(untiled(tiled(stack), n, k), stack)


@given(seed=st.integers(0, 10**6), n=SIZES, k=SIZES, zeros=st.floats(0, 1))
def test_values_follow_the_bits_of_the_mask(seed, n, k, zeros):
    matrix = random_int8(seed, (n, k), zeros)
    values, mask = pack(matrix)
    assert mask.shape == (-(-n // 16), -(-k // 4), 8)
    tiles, found = tiled(matrix), iter(values)
    for s, q in np.ndindex(mask.shape[:2]):
        bits = int.from_bytes(mask[s, q].tobytes(), "little")
        for bit in range(64):
            assert tiles[s, q, bit // 4, bit % 4] == (next(found) if bits >> bit & 1 else 0)
    assert next(found, None) is None
    assert np.array_equal(unpack(values, mask, n, k), matrix)


def test_masks_that_do_not_fit_are_refused():
    values, mask = pack(random_int8(0, (20, 10)))
    with pytest.raises(InputError, match="does not fit"):
        unpack(values, mask, 40, 10)
    with pytest.raises(InputError, match="does not fit"):
        unpack(values, mask, 20, 13)
    with pytest.raises(InputError, match="values"):
        unpack(values[1:], mask, 20, 10)
