"""ALPS (Meng, Behdin, Wang and Mazumder, arXiv 2406.07831, NeurIPS 2024): the mask by ADMM, then conjugate gradients on it.

    min ||X (W - W0)^T||_F^2 + lambda ||W - W0||_F^2    subject to    W = D,  D in the pattern

H is damped by lambda and scaled to unit diagonal, W by the inverse of that scale; all is undone at the end. With one
eigendecomposition A = Q diag(m) Q^T of the scaled H and Y = W0 A, each iteration is

    W <- (Y - V + rho D) Q diag(1 / (m + rho)) Q^T
    D <- projection of W + V / rho onto the pattern
    V <- V + rho (W - D)

and rho grows as the support of D settles. The support is then that of the projection of W, as in
the published code, and ten conjugate gradient iterations, zeroed off the support, fit the weights.

Also from the published code: lambda is 1 % of the *mean* of diag(H) (the text says of its trace), D starts from the magnitudes
of the scaled weights, and rho is first divided by 5, from a fresh start if the support moved at all, until the support moves by
0.5 % between two looks. We give that search up below rho = 1e-6: a support that nothing moves, such as
that of zero weights.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vitoats.errors import InputError
from vitoats.methods.budget import SparseConfig
from vitoats.methods.hessian import DAMPING, check_damping, damped_problem
from vitoats.methods.registry import Decomposition, measured, register
from vitoats.methods.statistics import InputStatistics

FIRST_RHO, LEAST_RHO, MOST_RHO = 0.1, 1e-6, 1e6
LOOK_EVERY = 3  # iterations between two looks at the support
# rho grows by this factor where at least this share of the support has moved
GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
MOVING = 0.005  # share of the support that has to move before rho may grow
SETTLED, SETTLED_AFTER = 3e-4, 30  # stop when a smaller share moves, from this iteration on


@dataclass(frozen=True, kw_only=True)
class ALPSConfig(SparseConfig):
    """Settings of ALPS; the defaults are the published code's.

    Attributes:
        pattern: "layer", the paper's: k counts over the whole matrix.
        iterations: of ADMM, at most.
        refit_iterations: of conjugate gradients.
        damping: lambda, as a share of the mean of diag(H).
    """

    pattern: str = "layer"
    iterations: int = 300
    refit_iterations: int = 10
    damping: float = DAMPING

    def __post_init__(self):
        super().__post_init__()
        if self.iterations < 1:
            raise InputError(f"{self.iterations} iterations are too few: --iterations takes 1 or more")
        if self.refit_iterations < 0:
            raise InputError(f"refit_iterations={self.refit_iterations} is out of range: give 0 or more")
        check_damping(self.damping)


@register("alps", ALPSConfig, needs="full")
def alps(weight: Tensor, statistics: InputStatistics, config: ALPSConfig) -> Decomposition:
    """Finds a mask and fits the weights on it.

    Args:
        weight: W [d_out, d_in].
        statistics: with H.
        config: the settings.

    Raises:
        InputError: a number is not finite, or the pattern or budget does not fit.
    """
    problem = damped_problem(weight, statistics, config.damping)
    scale = problem.H.diagonal().sqrt()  # [d_in]
    A = problem.H / scale / scale[:, None]
    W0 = problem.W * scale
    W, steps = admm(W0, A, config)
    mask = config.mask(W.abs())
    W = conjugate_gradients(torch.where(mask, W, 0), W0, A, mask, config.refit_iterations)
    return measured(weight, statistics, W / scale, steps=steps)


def admm(W0: Tensor, A: Tensor, config: ALPSConfig) -> tuple[Tensor, int]:
    """ADMM on scaled weights W0 [d_out, d_in] and scaled H, A [d_in, d_in].

    Returns:
        W [d_out, d_in], near the pattern but dense, and the number of iterations.
    """
    m, Q = torch.linalg.eigh(A)
    Y = W0 @ A
    start = torch.where(config.mask(W0.abs()), W0, 0)
    W, D, V, rho = W0, start, torch.zeros_like(W0), FIRST_RHO
    support, moving = D != 0, False
    size = int(support.sum())
    for step in range(1, config.iterations + 1):
        W = ((Y - V + rho * D) @ Q / (m + rho)) @ Q.T
        Z = W + V / rho
        D = torch.where(config.mask(Z.abs()), Z, 0)
        V = V + rho * (W - D)
        if step % LOOK_EVERY:
            continue
        moved = int((support ^ (D != 0)).sum())
        support = D != 0
        moving = moving or moved > MOVING * size
        if not moving:
            rho /= 5
            if rho < LEAST_RHO:
                break
            if moved:
                D, V = start, torch.zeros_like(V)
                support = D != 0
            continue
        if moved == 0 or (step >= SETTLED_AFTER and moved < SETTLED * size):
            break
        rho = min(MOST_RHO, rho * next(factor for share, factor in GROWTH if moved >= share * size))
    return W, step


def conjugate_gradients(W: Tensor, W0: Tensor, A: Tensor, mask: Tensor, iterations: int) -> Tensor:
    """Lowers ||(W - W0) A^(1/2)||_F^2 on a mask, row by row: residuals and directions are zeroed off it.

    Args:
        W: [d_out, d_in], where to start; zero off the mask.
        W0: [d_out, d_in], the goal.
        A: [d_in, d_in], positive definite with unit diagonal, which stands for the preconditioner.
        mask: bool [d_out, d_in].
        iterations: how many.
    """
    R = torch.where(mask, (W0 - W) @ A, 0)  # minus half the gradient
    P, energy = R, R.square().sum(dim=1, keepdim=True)
    for _ in range(iterations):
        AP = torch.where(mask, P @ A, 0)
        alpha = (energy / (P * AP).sum(dim=1, keepdim=True)).nan_to_num(0.0, posinf=0.0)  # a row that is done stays
        W = W + alpha * P
        R = R - alpha * AP
        last, energy = energy, R.square().sum(dim=1, keepdim=True)
        P = R + (energy / last).nan_to_num(0.0, posinf=0.0) * P
    return W
