"""MRP: multiple removal of weights with the joint optimal update (Zhao et al., "Pruning Foundation Models for High Accuracy
without Retraining", arXiv 2410.15567, Findings of EMNLP 2024), also called APT.

If a set P of a row's weights is removed at once, the best update and its cost are

    dw = -inv(H)[:, P] inv(inv(H)[P, P]) w_P        cost = w_P^T inv(inv(H)[P, P]) w_P

*All* kept weights change, including those to the left of a removed one. This is re-derived from the problem, since the authors
have published no code. Our choices:

* The cost of "mask S" ignores interactions, w_j^2 / inv(H)_jj; "mask M" includes them by trying all patterns of an N:M group,
  and is limited to N:M.
* "blockwise" sweeps the columns as SparseGPT does: later masks see compensated weights and, instead of inv(H), the inverse for
  the remaining columns. The weights are then refitted from the original ones on the final mask. "oneshot" chooses all masks
  from the original weights and inv(H).
* The comparison group is SparseGPT's, all rows (of a block of columns, if blockwise). The default is therefore SparseGPT's mask
  with weights whose damped error is never above SparseGPT's. ``pattern="row"`` compares within each row. Damping is 1 % of
  the mean of diag(H).
"""

from dataclasses import dataclass
from itertools import combinations
from math import comb
from typing import Literal, get_args

import torch
from torch import Tensor

from vitoats.common import linalg
from vitoats.common.errors import InputError
from vitoats.methods.budget import SparseConfig
from vitoats.methods.hessian import DAMPING, Problem, check_damping, cholesky, damped_problem, refit
from vitoats.methods.registry import Decomposition, measured, register
from vitoats.methods.sparsegpt import BLOCK_SIZE, check_block_size, saliency, sweep
from vitoats.methods.sparsity import Pattern
from vitoats.methods.statistics import InputStatistics

MOST_PATTERNS = 1000  # that mask M may try for one N:M group; 4:8 has 70

Mask = Literal["S", "M"]
Schedule = Literal["blockwise", "oneshot"]


@dataclass(frozen=True, kw_only=True)
class MRPConfig(SparseConfig):
    """Settings of MRP.

    Attributes:
        pattern: "layer" by default, as in SparseGPT.
        mask_choice: "S" ignores interactions between removed weights; "M", for N:M only, includes them.
        schedule: "blockwise" or "oneshot".
        damping: added to the diagonal of H, as a share of its mean.
        block_size: columns per block.
    """

    pattern: str = "layer"
    mask_choice: Mask = "S"
    schedule: Schedule = "blockwise"
    damping: float = DAMPING
    block_size: int = BLOCK_SIZE

    def __post_init__(self):
        super().__post_init__()
        pattern = Pattern.parse(self.pattern)
        if self.mask_choice not in get_args(Mask):
            raise InputError(f"unknown mask {self.mask_choice!r}: use mask_choice=S or mask_choice=M")
        if self.schedule not in get_args(Schedule):
            raise InputError(f"unknown schedule {self.schedule!r}: use schedule=blockwise or schedule=oneshot")
        if self.mask_choice == "M" and (pattern.kind != "N:M" or comb(pattern.m, pattern.n) > MOST_PATTERNS):
            raise InputError(
                f"mask M tries all patterns of a group, which {pattern} is not made for: "
                f"use `pattern='2:4'` or 4:8, or mask_choice=S"
            )
        check_damping(self.damping)
        check_block_size(self.block_size, pattern)


@register("mrp", MRPConfig, needs="full")
def mrp(weight: Tensor, statistics: InputStatistics, config: MRPConfig) -> Decomposition:
    """Chooses a mask and refits all kept weights jointly.

    Args:
        weight: W [d_out, d_in].
        statistics: moments of the layer's input, including H.
        config: the settings.

    Raises:
        InputError: a weight or moment is not finite, H is singular, or the pattern or budget does not fit.
    """
    problem = damped_problem(weight, statistics, config.damping)
    mask = blockwise_mask(problem, config) if config.schedule == "blockwise" else oneshot_mask(problem, config)
    return measured(weight, statistics, refit(problem, mask))


def blockwise_mask(problem: Problem, config: MRPConfig) -> Tensor:
    """The mask from a sweep over the columns, bool [d_out, d_in]."""
    pattern, kept = Pattern.parse(config.pattern), config.budget(*problem.W.shape).kept_per_group

    def choose(w: Tensor, R: Tensor, n: int) -> Tensor:
        if config.mask_choice == "S":
            return pattern.keep(saliency(w, R), n)
        return joint_mask(w, R.T @ R, n)  # R^T R is the leading part of the remaining H's inverse

    return sweep(problem, pattern, kept, config.block_size, choose)[1]


def oneshot_mask(problem: Problem, config: MRPConfig) -> Tensor:
    """The mask from the original weights, bool [d_out, d_in]."""
    inverse = linalg.cholesky_inverse(cholesky(problem.H))
    if config.mask_choice == "S":
        return config.mask(problem.W.abs() / inverse.diagonal().sqrt())
    pattern = Pattern.parse(config.pattern)
    n_in = problem.W.shape[1]
    config.budget(*problem.W.shape)  # refuses a width that M does not divide
    groups = [slice(i, i + pattern.m) for i in range(0, n_in, pattern.m)]
    return torch.cat([joint_mask(problem.W[:, g], inverse[g, g], pattern.n) for g in groups], dim=1)


def joint_mask(w: Tensor, inverse: Tensor, kept: int) -> Tensor:
    """Mask M of one group: for each row, the pattern whose joint removal costs least.

    Args:
        w: [d_out, m].
        inverse: [m, m], the inverse Hessian restricted to the group.
        kept: how many of the m inputs to keep.

    Returns:
        bool [d_out, m] with ``kept`` ones per row.
    """
    m = w.shape[1]
    removed = torch.tensor(list(combinations(range(m), m - kept)), device=w.device)  # [c, m - kept]
    B = linalg.inv(inverse[removed[:, :, None], removed[:, None, :]])  # [c, m - kept, m - kept]
    w_P = w[:, removed]  # [d_out, c, m - kept]
    cost = (torch.einsum("rcp,cpq->rcq", w_P, B) * w_P).sum(dim=2)  # [d_out, c]
    return torch.ones_like(w, dtype=torch.bool).scatter_(1, removed[cost.argmin(dim=1)], False)
