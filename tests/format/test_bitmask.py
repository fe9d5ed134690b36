"""The bit mask, against NumPy's own idea of a sparse matrix, and its refusal of masks that do not fit."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from vitoats.common.errors import InputError
from vitoats.format import bitmask

sparse = hnp.arrays(
    np.float32, st.tuples(st.integers(1, 9), st.integers(1, 33)), elements=st.sampled_from([0.0, -0.0, 1.5, -2.0])
)


@given(matrix=sparse)
def test_round_trip(matrix):
    values, mask = bitmask.pack(matrix)
    assert mask.shape == (matrix.shape[0], -(-matrix.shape[1] // 8))
    assert np.array_equal(values, matrix[np.nonzero(matrix)])  # row order
    assert np.array_equal(bitmask.unpack(values, mask, matrix.shape[1]), matrix)


@given(matrix=sparse)
def test_bits_are_least_significant_first(matrix):
    mask = bitmask.pack(matrix)[1]
    for i, j in np.ndindex(*matrix.shape):
        assert bool(mask[i, j // 8] >> (j % 8) & 1) == (matrix[i, j] != 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v, m: (v[:-1], m), "values"),
        (lambda v, m: (v, m[:, :1]), "does not fit"),
        (lambda v, m: (v, m | np.uint8(0x80)), "past its last column"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    values, mask = bitmask.pack(np.eye(4, 10, dtype=np.float32))
    with pytest.raises(InputError, match=message):
        bitmask.unpack(*change(values, mask), 10)
