"""Outlier shares of blocks, by hand."""

import pytest
import torch

from tests.calibration.states import collect
from vitoats.compression.outliers import outlier_shares


def test_outliers_by_hand(tiny):
    """One weight of the last layer made huge is the only outlier of its block."""
    images = torch.randn(8, 3, 32, 32)
    tiny.blocks[1].mlp.fc2.weight.data[3, 7] = 1e8
    adapter, hidden = collect(tiny, images)
    shares = outlier_shares(adapter.blocks, hidden)
    assert shares[1] == pytest.approx(1 / (12 * 48 * 48))
    assert shares[0] > shares[1]
