"""Magnitude pruning: removes the smallest weights, regardless of the inputs.

By default the comparison group is the whole matrix, with one threshold per linear layer, as in the published code of Wanda and
SparseGPT. Calibration only serves to report the error.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vitoats.methods.budget import SparseConfig
from vitoats.methods.registry import Decomposition, measured, register
from vitoats.methods.statistics import InputStatistics, check_finite


@dataclass(frozen=True, kw_only=True)
class MagnitudeConfig(SparseConfig):
    """Settings of magnitude pruning."""

    pattern: str = "layer"


@register("magnitude", MagnitudeConfig, needs="diagonal")
def magnitude(weight: Tensor, statistics: InputStatistics, config: MagnitudeConfig) -> Decomposition:
    """Keeps the largest |W|.

    Args:
        weight: W [d_out, d_in].
        statistics: second_moment [d_in], for the reported error.
        config: the settings.

    Raises:
        InputError: a weight or moment is not finite, or the pattern or budget does not fit.
    """
    check_finite(weight, statistics)
    return measured(weight, statistics, torch.where(config.mask(weight.abs()), weight, 0))
