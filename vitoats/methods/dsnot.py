"""DSNoT: dynamic sparse no training (Zhang et al., arXiv 2310.08915, ICLR 2024): swaps weights in and out of a mask.

d_ij = W_ij * mean(x_j) is the contribution of input j to the mean of output i, so the mean error of row i is e_i, the sum of
d_ij over removed j. Each cycle does the following in each row with |e_i| above a threshold:

    grow    the removed weight that lowers |e| most relative to its input's variance: largest d / var^p if e > 0, else smallest
    remove  among the kept weights whose d then lowers |e|, the one with the lowest Wanda score

Only the mask changes. Each row keeps the same number of weights, and each weight is swapped at most once. Our choices for
vision transformers and the patterns:

* The published threshold, 0.1 on sums over sequences of 2048 tokens, becomes 0.1 / 2048 on means over tokens.
* The variance is over all tokens, mean(x^2) - mean(x)^2; the published code averages the variances within each sequence.
* All linear layers are refined; the published default leaves those of the MLP at the initial mask.
* What may be removed depends on the sign of e after the growth; in the published code on its sign before, so that a removal may
  take e further from 0 once the growth has overshot.
* With N:M, the removed weight comes from the group of the grown one, and a row stops when the sign of e would flip. A row
  also stops when it has no weight to remove. With blocks, d, d / var^p and squared scores are summed over each block, which is
  swapped as a whole.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from vitoats.common.errors import InputError
from vitoats.methods.budget import SparseConfig, check_iterations
from vitoats.methods.registry import Decomposition, measured, register
from vitoats.methods.sparsity import Pattern
from vitoats.methods.statistics import InputStatistics, check_finite
from vitoats.methods.wanda import wanda_score

THRESHOLD = 0.1 / 2048  # for |e|, per token

Initial = Literal["wanda", "magnitude"]


@dataclass(frozen=True, kw_only=True)
class DSNoTConfig(SparseConfig):
    """Settings of DSNoT; the defaults are the published code's.

    Attributes:
        initial: the initial mask, "wanda" or "magnitude".
        iterations: maximum number of cycles, each with one swap per row.
        threshold: a row is done once |e| is not above it.
        power: p, the exponent of the variance.
    """

    initial: Initial = "wanda"
    iterations: int = 50
    threshold: float = THRESHOLD
    power: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        if self.initial not in get_args(Initial):
            raise InputError(f"unknown first mask {self.initial!r}: use initial=wanda or initial=magnitude")
        check_iterations(self.iterations)
        if not self.threshold >= 0 or not self.power >= 0:
            raise InputError("threshold and power take numbers of 0 or more: leave `threshold` and `power` out")


@register("dsnot", DSNoTConfig, needs="full")
def dsnot(weight: Tensor, statistics: InputStatistics, config: DSNoTConfig) -> Decomposition:
    """Refines a mask.

    Args:
        weight: W [d_out, d_in].
        statistics: moments of the layer's input, including H and the mean.
        config: the settings.

    Raises:
        InputError: a weight or moment is not finite, or the pattern or budget does not fit.
    """
    check_finite(weight, statistics)
    assert statistics.mean is not None
    pattern = Pattern.parse(config.pattern)
    score = wanda_score(weight, statistics)
    mask = config.mask(score if config.initial == "wanda" else weight.abs())
    double = torch.finfo(torch.float64)
    least = max(double.eps * statistics.second_moment.max().item(), double.tiny)  # round-off alone, for a constant input
    variance = (statistics.second_moment - statistics.mean.square()).clamp(min=least)
    d = weight.double() * statistics.mean
    growth = pattern.units(d / variance**config.power)
    units = mask.unflatten(1, (-1, pattern.width))[:, :, 0]
    units, steps = swap(units, pattern.units(d), growth, pattern.units(score.square()), pattern, config)
    return measured(weight, statistics, torch.where(pattern.spread(units), weight, 0), steps=steps)


def swap(mask: Tensor, d: Tensor, growth: Tensor, score: Tensor, pattern: Pattern, config: DSNoTConfig) -> tuple[Tensor, int]:
    """Runs the cycles on all rows at once; all tensors are [d_out, n].

    Args:
        mask: bool, the initial mask.
        d: the contribution of each weight to the mean output.
        growth: ranks the weights to grow.
        score: ranks the weights to remove.
        pattern: N:M removes within the group of the grown weight.
        config: the settings.

    Returns:
        the new mask, and the number of cycles.
    """
    mask, may_grow, may_go = mask.clone(), ~mask, mask.clone()
    rows = torch.arange(len(mask), device=mask.device)
    group = torch.arange(mask.shape[1], device=mask.device) // max(pattern.m, 1)
    e = torch.where(mask, 0, d).sum(dim=1)
    active = e.abs() > config.threshold
    cycle = 0
    while cycle < config.iterations and active.any():
        cycle += 1
        sign = e.sign()
        lowers = torch.where(may_grow, growth * sign[:, None], -torch.inf)
        grown = lowers.argmax(dim=1)
        after = e - d[rows, grown]
        fits = group == group[grown][:, None] if pattern.kind == "N:M" else d * after[:, None] < 0
        candidates = may_go & fits
        gone = torch.where(candidates, score, torch.inf).argmin(dim=1)
        after = after + d[rows, gone]
        active &= may_grow.any(dim=1) & candidates.any(dim=1)
        if pattern.kind == "N:M":
            active &= after.sign() == sign
        r, grow, go = rows[active], grown[active], gone[active]
        mask[r, grow], mask[r, go] = True, False
        may_grow[r, grow], may_go[r, go] = False, False
        e = torch.where(active, after, e)
        active &= e.abs() > config.threshold
    return mask, cycle
