"""SparseGPT (Frantar and Alistarh, arXiv 2301.00774, ICML 2023): prunes column by column and compensates to the right.

R is the upper factor of H^-1 = R^T R. Columns are processed from left to right. Removing w_i costs (w_i / R_ii)^2 and is
compensated by

    w[i:] -= (w_i / R_ii) R[i, i:]

which is optimal with the columns to the left frozen (optimal brain surgeon). Masks are chosen when a block of columns is
reached, from the weights as updated by then: every M columns for N:M, every ``block_size`` columns otherwise.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vitoats.common.errors import InputError
from vitoats.methods.budget import SparseConfig
from vitoats.methods.hessian import DAMPING, Problem, check_damping, damped_problem, inverse_factor
from vitoats.methods.registry import Decomposition, measured, register
from vitoats.methods.sparsity import Pattern
from vitoats.methods.statistics import InputStatistics

BLOCK_SIZE = 128  # columns, as in the published code

# (weights [d_out, b], R [b, b] of these columns, how many to keep in each group) -> bool [d_out, b]
Choice = Callable[[Tensor, Tensor, int], Tensor]


@dataclass(frozen=True, kw_only=True)
class SparseGPTConfig(SparseConfig):
    """Settings of SparseGPT; the defaults are the published code's.

    Attributes:
        pattern: the comparison group within a block of columns: "layer" for all rows, as published; "row" for each row.
            A block of columns keeps the same share as the whole, up to rounding that does not accumulate.
        damping: added to the diagonal of H, as a share of its mean.
        block_size: columns for which a mask is chosen at once; a multiple of an N:M pattern's M or of a block's width.
    """

    pattern: str = "layer"
    damping: float = DAMPING
    block_size: int = BLOCK_SIZE

    def __post_init__(self):
        super().__post_init__()
        check_damping(self.damping)
        check_block_size(self.block_size, Pattern.parse(self.pattern))


@register("sparsegpt", SparseGPTConfig, needs="full")
def sparsegpt(weight: Tensor, statistics: InputStatistics, config: SparseGPTConfig) -> Decomposition:
    """Prunes and compensates.

    Args:
        weight: W [d_out, d_in].
        statistics: moments of the layer's input, including H.
        config: the settings.

    Raises:
        InputError: a weight or moment is not finite, H is singular, or the pattern or budget does not fit.
    """
    problem = damped_problem(weight, statistics, config.damping)
    pattern, kept = Pattern.parse(config.pattern), config.budget(*weight.shape).kept_per_group
    S, _ = sweep(problem, pattern, kept, config.block_size, lambda w, R, n: pattern.keep(saliency(w, R), n))
    return measured(weight, statistics, S)


def check_block_size(block_size: int, pattern: Pattern) -> None:
    """Refuses a block size that cuts through the pattern's units.

    Raises:
        InputError: ``block_size`` is not a positive multiple of the unit.
    """
    unit = pattern.m if pattern.kind == "N:M" else pattern.width
    if block_size < 1 or block_size % unit:
        raise InputError(
            f"block size {block_size} does not fit pattern {pattern}: give a multiple of {unit}, say block_size={BLOCK_SIZE}"
        )


def saliency(w: Tensor, R: Tensor) -> Tensor:
    """Square root of the cost of removing each weight of w [d_out, b], with the columns to its left frozen: |w_i| / R_ii."""
    return w.abs() / R.diagonal()


def sweep(problem: Problem, pattern: Pattern, kept: int, block_size: int, choose: Choice) -> tuple[Tensor, Tensor]:
    """Sweeps the columns from left to right: chooses masks, removes weights, compensates.

    Args:
        problem: W [d_out, d_in] and H.
        pattern: its kind determines for how many columns a mask is chosen at once.
        kept: entries of the whole matrix to keep in each group of the pattern.
        block_size: columns whose updates are applied to the rest at once.
        choose: chooses which entries of some columns to keep.

    Returns:
        W' [d_out, d_in] with explicit zeros, and the mask, bool [d_out, d_in].
    """
    W, R = problem.W.clone(), inverse_factor(problem.H)
    d_out, d_in = W.shape
    span = pattern.m if pattern.kind == "N:M" else block_size  # columns for which a mask is chosen at once
    mask = torch.empty(W.shape, dtype=torch.bool, device=W.device)
    for start in range(0, d_in, block_size):
        stop = min(start + block_size, d_in)
        errors = W.new_empty(d_out, stop - start)
        for i in range(start, stop):
            if i % span == 0:
                end = min(i + span, d_in)
                n = (
                    kept
                    if pattern.kind == "N:M"
                    else _kept_until(end, kept, d_in, pattern) - _kept_until(i, kept, d_in, pattern)
                )
                mask[:, i:end] = choose(W[:, i:end], R[i:end, i:end], n)
            errors[:, i - start] = torch.where(mask[:, i], 0, W[:, i]) / R[i, i]
            W[:, i:stop] -= errors[:, i - start, None] * R[i, i:stop]
        W[:, stop:] -= errors @ R[start:stop, stop:]
    return torch.where(mask, W, 0), mask


def _kept_until(column: int, kept: int, d_in: int, pattern: Pattern) -> int:
    """How many entries of a group to keep in the columns before this one: their share, in whole units; ``kept`` at d_in."""
    return pattern.width * (kept * column // (d_in * pattern.width))
