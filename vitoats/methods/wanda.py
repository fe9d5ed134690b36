"""Wanda: pruning by weights and activations (Sun, Liu, Bair and Kolter, arXiv 2306.11695, ICLR 2024).

    score_ij = |W_ij| * ||X_j||_2

The lowest scores of each output row are removed; the other weights do not change. The root mean square replaces ||X_j||_2,
which gives the same ranking. OATS without a low-rank term is the same.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vitoats.methods.budget import SparseConfig
from vitoats.methods.registry import Decomposition, measured, register
from vitoats.methods.statistics import InputStatistics, check_finite


@dataclass(frozen=True, kw_only=True)
class WandaConfig(SparseConfig):
    """Settings of Wanda; the comparison group is an output row, as in the paper."""


@register("wanda", WandaConfig, needs="diagonal")
def wanda(weight: Tensor, statistics: InputStatistics, config: WandaConfig) -> Decomposition:
    """Keeps the weights with the largest scores.

    Args:
        weight: W [d_out, d_in].
        statistics: second_moment [d_in].
        config: the settings.

    Raises:
        InputError: a weight or moment is not finite, or the pattern or budget does not fit.
    """
    check_finite(weight, statistics)
    mask = config.mask(wanda_score(weight, statistics))
    return measured(weight, statistics, torch.where(mask, weight, 0))


def wanda_score(weight: Tensor, statistics: InputStatistics) -> Tensor:
    """|W_ij| * sqrt(mean of x_j^2), [d_out, d_in] in float64."""
    return weight.double().abs() * statistics.second_moment.sqrt()
