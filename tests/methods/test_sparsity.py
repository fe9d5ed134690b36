"""The hard threshold, against a sort in NumPy, and the warm-started threshold, against the exact one."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from vitoats.common.errors import InputError
from vitoats.methods.sparsity import Pattern, WarmThreshold, largest, smallest


def largest_by_sorting(magnitudes: np.ndarray, kept: int) -> np.ndarray:
    """Sorts each row stably and drops from the front, as the published code does."""
    mask = np.ones(magnitudes.shape, bool)
    for row, dropped in zip(mask, np.argsort(magnitudes, axis=1, kind="stable"), strict=True):
        row[dropped[: magnitudes.shape[1] - kept]] = False
    return mask


# few distinct values, so that ties are common; widths on both sides of the pairwise limit
ties = hnp.arrays(np.float32, st.tuples(st.integers(1, 6), st.integers(1, 50)), elements=st.integers(0, 5).map(float))


@given(magnitudes=ties, data=st.data())
def test_largest_is_the_stable_sort(magnitudes, data):
    kept = data.draw(st.integers(0, magnitudes.shape[1]))
    assert np.array_equal(largest(torch.from_numpy(magnitudes), kept).numpy(), largest_by_sorting(magnitudes, kept))


@settings(deadline=None, max_examples=200)
@given(values=st.lists(st.floats(0, 2.0**100, width=32), min_size=1, max_size=60), data=st.data())
def test_the_kth_smallest_of_one_long_row(values, data):
    """Zeros, denormals, ties and values that differ in their last bits alone."""
    k = data.draw(st.integers(1, len(values)))
    assert smallest(torch.tensor([values], dtype=torch.float32), k).item() == sorted(values)[k - 1]


@pytest.mark.parametrize(
    ("text", "shape"), [("row", (6, 8)), ("layer", (1, 48)), ("2:4", (12, 4)), ("1:8", (6, 8)), ("1x4", (6, 8))]
)
def test_groups(text, shape):
    pattern = Pattern.parse(text)
    assert pattern.groups(torch.zeros(6, 8)).shape == shape
    assert str(pattern) == text


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    width=st.sampled_from([2, 4]),
    rows=st.integers(1, 5),
    blocks=st.sampled_from([1, 3, 8, 40]),
    data=st.data(),
)
def test_blocks_keep_the_largest_sums_of_squares_of_each_row(seed, width, rows, blocks, data):
    kept = data.draw(st.integers(0, blocks))
    magnitudes = torch.from_numpy(np.random.default_rng(seed).random((rows, blocks * width)))
    mask = Pattern.parse(f"1x{width}").keep(magnitudes, kept * width)
    energy = magnitudes.numpy().reshape(rows, blocks, width) ** 2
    for row, marked in zip(energy.sum(axis=2), mask.numpy().reshape(rows, blocks, width), strict=True):
        assert (marked.all(axis=1) | ~marked.any(axis=1)).all()
        assert set(np.flatnonzero(marked[:, 0])) == set(np.argsort(row)[blocks - kept :])


@pytest.mark.parametrize("text", ["row", "layer", "2:4"])
def test_keep_is_the_largest_of_each_group(text):
    pattern, magnitudes = Pattern.parse(text), torch.rand(6, 8)
    kept = 2 if text == "2:4" else 5
    assert torch.equal(pattern.groups(pattern.keep(magnitudes, kept)), largest(pattern.groups(magnitudes), kept))
    assert torch.equal(pattern.keep(magnitudes.T.contiguous().T, kept), pattern.keep(magnitudes, kept))  # any memory layout


@pytest.mark.parametrize("text", ["rows", "4:2", "0:4", "2:2", "2:64", "2-4", "1x3", "2x4", "1x", ""])
def test_unknown_patterns_are_refused(text):
    with pytest.raises(InputError, match="use row, layer, 1x2, 1x4, or N:M"):
        Pattern.parse(text)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6), rows=st.integers(1, 20), size=st.integers(20, 400), share=st.floats(0.02, 0.98))
def test_warm_threshold_stays_within_a_twentieth(seed, rows, size, share):
    torch.manual_seed(seed)
    kept = max(1, min(size - 1, round(share * size)))
    warm, mask = WarmThreshold(kept), torch.empty(rows, size)
    values = torch.randn(rows, size) * torch.rand(rows, 1) * 10
    for _ in range(6):
        values = 0.95 * values + 0.1 * torch.randn_like(values)
        marked = warm.mark(values.abs(), mask)
        assert torch.equal(marked, mask.sum(dim=1, keepdim=True))
        assert ((marked - kept).abs() <= 1 + 0.05 * kept).all()
        assert torch.equal(mask, (values.abs() > warm.threshold).float())  # the largest ones, however many


@pytest.mark.parametrize("kept", [0, 5])
def test_warm_threshold_keeps_nothing_or_all(kept):
    mask = torch.empty(3, 5)
    assert (WarmThreshold(kept).mark(torch.rand(3, 5), mask) == kept).all()
    assert (mask == float(kept > 0)).all()


def test_warm_threshold_bears_dead_and_tied_groups():
    warm, mask = WarmThreshold(2), torch.empty(3, 6)
    magnitudes = torch.tensor([[0.0] * 6, [1.0] * 6, [1.0, 2, 3, 4, 5, 6]])
    for _ in range(3):
        warm.mark(magnitudes, mask)
        assert torch.isfinite(warm.threshold).all()
        assert mask[2].tolist() == [0, 0, 0, 0, 1, 1]
