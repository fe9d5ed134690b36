"""Rank and non-zeros: the paper's rounding, checked against worked values and by counting."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitoats.common.errors import InputError
from vitoats.methods.budget import effective_compression, layer_budget
from vitoats.methods.sparsity import Pattern

ROW = Pattern.parse("row")


@pytest.mark.parametrize(
    ("compression", "shape", "rank", "per_row"),
    [  # ViT-B at rank ratio 0.2, as the published code rounds
        (0.3, (768, 768), 53, 431),
        (0.4, (768, 768), 46, 369),
        (0.5, (768, 768), 38, 308),
        (0.6, (768, 768), 30, 246),
        (0.3, (3072, 768), 86, 431),
        (0.5, (3072, 768), 61, 308),
        (0.4, (768, 3072), 73, 1475),
        (0.5, (768, 3072), 61, 1229),
        (0.6, (768, 3072), 49, 984),
    ],
)
def test_worked_values(compression, shape, rank, per_row):
    budget = layer_budget(*shape, compression, 0.2, ROW)
    assert (budget.rank, budget.kept_per_group) == (rank, per_row)


@given(d_out=st.integers(2, 500), d_in=st.integers(2, 500), compression=st.floats(0, 0.9), rank_ratio=st.floats(0, 1))
def test_kept_parameters_match_the_compression(d_out, d_in, compression, rank_ratio):
    try:
        budget = layer_budget(d_out, d_in, compression, rank_ratio, ROW)
    except InputError:
        assert (1 - compression) * d_in < 1 or rank_ratio > 0.5  # too small a layer for any budget
        return
    assert 0 <= budget.rank <= min(d_out, d_in)
    assert 0 <= budget.kept_per_group <= d_in
    kept = budget.rank * (d_out + d_in) + budget.kept_per_group * d_out
    asked = (1 - compression) * d_out * d_in
    assert asked - (d_out + d_in) - 1e-6 <= kept <= asked + d_out + 1e-6  # a rank is rounded down, a row's count up


def test_layer_pattern_keeps_as_many_as_row():
    row, layer = layer_budget(64, 48, 0.5, 0.25, ROW), layer_budget(64, 48, 0.5, 0.25, Pattern.parse("layer"))
    assert layer.rank == row.rank
    assert layer.kept_per_group == 64 * row.kept_per_group


@given(d_in=st.integers(2, 60).map(lambda n: 4 * n), compression=st.floats(0.05, 0.9), pattern=st.sampled_from(["1x2", "1x4"]))
def test_blocks_round_to_the_nearest_whole_block_of_a_row(d_in, compression, pattern):
    width = int(pattern[-1])
    try:
        kept = layer_budget(16, d_in, compression, 0.0, Pattern.parse(pattern)).kept_per_group
    except InputError:
        assert (1 - compression) * d_in < width / 2
        return
    assert kept % width == 0
    assert abs(kept - layer_budget(16, d_in, compression, 0.0, ROW).kept_per_group) <= width / 2


@pytest.mark.parametrize(
    ("pattern", "rank_ratio", "compression"),
    [("2:4", 0.0, 0.5), ("2:4", 0.2, 0.375), ("2:8", 0.25, 2 / 3), ("2:8", 0.5, 0.5)],
)
def test_nm_implies_the_compression(pattern, rank_ratio, compression):
    parsed = Pattern.parse(pattern)
    assert effective_compression(None, rank_ratio, parsed) == pytest.approx(compression)
    kept = (1 - compression) * 256 * 512
    assert layer_budget(256, 512, compression, rank_ratio, parsed).rank == int(rank_ratio * kept / (256 + 512))


@pytest.mark.parametrize(
    ("compression", "rank_ratio", "pattern", "remedy"),
    [
        # out of range
        (1.0, 0.2, "row", "`compression`"),
        (-0.1, 0.2, "row", "`compression`"),
        (0.5, 1.1, "row", "`rank_ratio`"),
        (0.5, -0.1, "row", "`rank_ratio`"),
        (float("nan"), 0.2, "row", "`compression`"),
        # N:M that contradicts or removes nothing
        (0.5, 0.2, "2:4", "`rank_ratio` 0"),
        (None, 0.6, "2:4", "`rank_ratio` below 0.5"),
        # nothing said
        (None, 0.2, "row", "`compression`"),
    ],
)
def test_refused(compression, rank_ratio, pattern, remedy):
    with pytest.raises(InputError, match=remedy):
        effective_compression(compression, rank_ratio, Pattern.parse(pattern))


def test_nothing_left_is_refused():
    with pytest.raises(InputError, match="leaves nothing"):
        layer_budget(4, 4, 0.9, 1.0, ROW)


def test_width_that_is_no_multiple_of_m_is_refused():
    with pytest.raises(InputError, match="multiple of 4"):
        layer_budget(8, 6, 0.5, 0.0, Pattern.parse("2:4"))
    with pytest.raises(
        InputError, match="pattern 1x4 needs an input width that is a multiple of 4, not 6: use `pattern='row'`"
    ):
        layer_budget(8, 6, 0.5, 0.0, Pattern.parse("1x4"))
