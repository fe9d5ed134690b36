"""ALPS (Meng, Behdin, Wang and Mazumder, arXiv 2406.07831, NeurIPS 2024): the mask by ADMM, then conjugate gradients on it.

    min ||X (W - W0)^T||_F^2 + lambda ||W - W0||_F^2    subject to    W = D,  D in the pattern

H is damped by lambda and scaled to unit diagonal, and W by the inverse scale; both scalings are undone at the end. The
iterations and the penalty schedule are in ``vitoats.methods.admm``. The final support is that of W's projection, as in the
published code, and ten conjugate gradient iterations restricted to it fit the weights.

Also from the published code: lambda is 1 % of the *mean* of diag(H) (the paper's text says of its trace), D starts from the
largest scaled weights, and rho is first searched downwards until the support changes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vitoats.common import linalg
from vitoats.common.errors import InputError
from vitoats.methods.admm import PENALTIES, LowRank, admm, conjugate_gradients
from vitoats.methods.budget import SparseConfig, check_iterations
from vitoats.methods.hessian import DAMPING, check_damping, damped_problem
from vitoats.methods.registry import Decomposition, measured, register
from vitoats.methods.statistics import InputStatistics


@dataclass(frozen=True, kw_only=True)
class ALPSConfig(SparseConfig):
    """Settings of ALPS; the defaults are the published code's.

    Attributes:
        pattern: "layer" by default, as in the paper: k counts entries of the whole matrix.
        iterations: maximum number of ADMM iterations.
        refit_iterations: number of conjugate gradient iterations.
        damping: lambda, as a share of the mean of diag(H).
    """

    pattern: str = "layer"
    iterations: int = 300
    refit_iterations: int = 10
    damping: float = DAMPING

    def __post_init__(self):
        super().__post_init__()
        check_iterations(self.iterations)
        if self.refit_iterations < 0:
            raise InputError(f"refit_iterations={self.refit_iterations} is out of range: give 0 or more")
        check_damping(self.damping)


@register("alps", ALPSConfig, needs="full")
def alps(weight: Tensor, statistics: InputStatistics, config: ALPSConfig) -> Decomposition:
    """Finds a mask and fits the weights on it.

    Args:
        weight: W [d_out, d_in].
        statistics: moments of the layer's input, including H.
        config: the settings.

    Raises:
        InputError: a weight or moment is not finite, or the pattern or budget does not fit.
    """
    problem = damped_problem(weight, statistics, config.damping)
    scale = problem.H.diagonal().sqrt()  # [d_in]
    A = problem.H / scale / scale[:, None]
    W0 = problem.W * scale
    nothing = LowRank(A, len(W0), rank=0, seed=0)
    W, steps = admm(W0, A, linalg.eigh(A), config.mask, PENALTIES["alps"], config.iterations, nothing)
    mask = config.mask(W.abs())
    W = conjugate_gradients(torch.where(mask, W, 0), W0, A, mask, config.refit_iterations)
    return measured(weight, statistics, W / scale, steps=steps)
