"""Activation-weighted SVD: the best low-rank weights for the layer's output.

With H = C C^T (damped, Cholesky), ||X (W - L)^T||_F^2 / n_tokens = ||(W - L) C||_F^2. By Eckart and Young, the best L of rank r
is therefore

    L = SVD_r(W C) C^-1

The whitening by a Cholesky factor is that of SVD-LLM (arXiv 2403.07378). U carries the singular values.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vitoats.common import linalg
from vitoats.common.errors import InputError
from vitoats.methods.budget import LayerBudget, effective_compression, layer_budget
from vitoats.methods.hessian import DAMPING, check_damping, cholesky, damped_problem
from vitoats.methods.oats import truncated_svd
from vitoats.methods.registry import Decomposition, magnitude_of, measured, register
from vitoats.methods.sparsity import Pattern
from vitoats.methods.statistics import InputStatistics


@dataclass(frozen=True, kw_only=True)
class SVDConfig:
    """Settings of the activation-weighted SVD.

    Attributes:
        compression: rho, the share of the weights that is removed; rounding the rank down removes up to one rank more,
            d_in + d_out parameters.
        damping: added to the diagonal of H, as a share of its mean.
    """

    compression: float = 0.5
    damping: float = DAMPING

    def __post_init__(self):
        self.total_compression()
        check_damping(self.damping)

    def total_compression(self) -> float:
        """rho."""
        return effective_compression(self.compression, None, Pattern("row"))

    def budget(self, d_out: int, d_in: int) -> LayerBudget:
        """What a d_out x d_in matrix may keep: r (d_in + d_out) <= (1 - rho) d_in d_out, and no entry of S.

        Raises:
            InputError: not even rank 1 is left.
        """
        budget = layer_budget(d_out, d_in, self.total_compression(), 1.0, Pattern("row"))
        if budget.rank == 0:
            raise InputError(
                f"compression {self.compression:g} leaves no rank of a {d_out} x {d_in} layer: lower `compression`"
            )
        return LayerBudget(budget.rank, 0)


@register("svd", SVDConfig, needs="full")
def svd(weight: Tensor, statistics: InputStatistics, config: SVDConfig) -> Decomposition:
    """Factors one weight matrix.

    Args:
        weight: W [d_out, d_in].
        statistics: moments of the layer's input, including H.
        config: the settings.

    Raises:
        InputError: a weight or moment is not finite, H is singular, or not even rank 1 is left.
    """
    problem = damped_problem(weight, statistics, config.damping)
    C = cholesky(problem.H)
    U, Vt = truncated_svd(problem.W @ C, config.budget(*weight.shape).rank)
    V = linalg.solve_triangular(C, Vt, upper=False, left=False)  # V C = Vt
    unit = magnitude_of(U)
    return measured(weight, statistics, torch.zeros_like(weight), U / unit, V * unit)
