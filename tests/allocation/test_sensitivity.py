"""Errors between and beyond the rates that were measured, and how they count."""

import numpy as np
import pytest

from tests.allocation.layers import LAYERS
from vitoats.allocation.sensitivity import FIRST_BLOCK_SHARE, RATE_WITHOUT_RANK, Sensitivity, counted_by_depth


def test_the_logarithm_is_linear_between_rates_and_beyond():
    layer = LAYERS[0]
    kept = np.linspace(0.08, 0.95, 30)
    assert np.allclose(layer.log_error(kept), np.log(0.5) - 6.0 * kept)


def test_noise_never_makes_keeping_more_look_worse():
    bumpy = Sensitivity("x", 100, (0.2, 0.1, 0.3, 0.9))  # 55 % removed looked better than 35 %
    assert (np.diff(bumpy.log_error(np.linspace(0.08, 0.95, 50))) <= 1e-12).all()


def test_errors_count_the_less_the_more_blocks_can_make_up_for_them():
    blocks = [[f"{block}.{i}" for i in range(2)] for block in range(3)]
    measured = [Sensitivity(name, 10, (0.1, 0.2, 0.3, 0.4), 0.5) for block in blocks for name in block]
    counted = {s.name: s for s in counted_by_depth(measured, blocks)}
    assert counted["2.1"] == measured[-1]
    assert counted["0.0"].errors == pytest.approx([FIRST_BLOCK_SHARE * e for e in measured[0].errors])
    assert counted["1.0"].without_rank ** 2 == pytest.approx(counted["0.0"].without_rank * counted["2.0"].without_rank)


def test_the_error_without_a_low_rank_term_is_the_same_factor_off_everywhere():
    layer = Sensitivity("x", 100, (0.1, 0.2, 0.4, 0.8), without_rank=0.6)
    kept = np.array([0.1, 0.5, 1 - RATE_WITHOUT_RANK, 1.0])
    assert np.allclose(layer.error(kept, 0.0), 1.5 * layer.error(kept, 0.25))
    assert layer.error(kept, 0.0)[2:].tolist() == pytest.approx([0.6, 0])
    assert np.array_equal(layer.error(kept, None), layer.error(kept, 0.25))
    unknown = Sensitivity("x", 100, (0.1, 0.2, 0.4, 0.8))
    assert np.array_equal(unknown.error(kept, 0.0), unknown.error(kept, 0.25))
