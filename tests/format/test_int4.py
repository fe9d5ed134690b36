"""4-bit weights against what defines them, entry by entry."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitoats.format.int4 import round_groups


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 100))
def test_each_group_has_its_own_scale(seed, d_out, d_in):
    weight = torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(seed))
    found = round_groups(weight)
    assert found.shape == weight.shape
    for row, got in zip(weight, found, strict=True):
        for w, x in zip(row.split(32), got.split(32), strict=True):
            largest = max(w.tolist(), key=abs)
            step = largest / -8
            levels = (x / step).round()
            torch.testing.assert_close(levels * step, x)
            assert ((levels >= -8) & (levels <= 7)).all()
            assert -8 in levels
            nearest = torch.tensor([min(range(-8, 8), key=lambda q, v=v: abs(q * step - v)) * step for v in w.tolist()])
            assert ((x - w).abs() <= (nearest - w).abs() + 1e-6 * abs(step)).all()


def test_zeros_stay():
    assert torch.equal(round_groups(torch.zeros(2, 40)), torch.zeros(2, 40))
