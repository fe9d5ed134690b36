"""ADMM for a layer's weights on a sparsity pattern, with a low-rank term beside them, and conjugate gradients on the support.

    min tr((W0 - D - L) A (W0 - D - L)^T)    subject to    D in the pattern,  rank(L) <= r

with A [d_in, d_in] positive definite of near unit diagonal, and one eigendecomposition A = Q diag(m) Q^T. ADMM splits the
sparse term into B, which meets the objective, and D, which meets the pattern; each iteration is

    B <- ((W0 - L) A - V + rho D) Q diag(1 / (m + rho)) Q^T
    D <- projection of B + V / rho onto the pattern
    V <- V + rho (B - D)
    L <- the best of rank r for W0 - D

and rho grows as the support of D settles ("support-driven"). Without L this is the ADMM of ALPS (arXiv 2406.07831); L taken
from D rather than from B is our choice, since what L is fitted to is then what S will be.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

LOOK_EVERY = 3  # iterations between two looks at the support
SETTLED_AFTER = 30  # iterations, from which on a support that has settled ends the search
MOVING = 0.005  # share of the support that has to move before a searched rho may grow
LEAST_RHO, MOST_RHO = 1e-6, 1e6


@dataclass(frozen=True)
class Penalty:
    """How rho goes.

    Attributes:
        first: where it starts.
        settled: the search ends when a smaller share of the support has moved.
        growth: (share, factor): rho grows by the first factor whose share of the support, or more, has moved.
        search: first divide rho by 5, from a fresh start if the support moved at all, until the support moves by ``MOVING``
            between two looks; given up below ``LEAST_RHO``.
    """

    first: float
    settled: float
    growth: tuple[tuple[float, float], ...]
    search: bool


PENALTIES = {
    "alps": Penalty(0.1, 3e-4, ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1)), search=True),  # its published code's
    "slow": Penalty(0.02, 5e-3, ((0.1, 1.2), (0.005, 1.1), (0.0, 1.05)), search=False),
}


class LowRank:
    """The best L = U V of rank r in the metric A, followed by subspace iteration as what it is fitted to moves.

    The leading left singular vectors of R A^(1/2) are those of R A R^T, and with U spanning them the best L is U U^T R. So one
    step for R is  U <- qr(R A V^T),  V <- U^T R,  which needs no root of A and no division by it.
    """

    def __init__(self, A: Tensor, d_out: int, rank: int, seed: int):
        generator = torch.Generator().manual_seed(seed)
        self.A = A
        self.U = A.new_zeros(d_out, rank)
        self.V = torch.randn(rank, A.shape[0], generator=generator, dtype=A.dtype).to(A.device)
        self.VA = self.V @ A

    @property
    def rank(self) -> int:
        return self.U.shape[1]

    def fit(self, R: Tensor, steps: int = 1) -> None:
        """Moves L towards the best approximation of R [d_out, d_in]."""
        for _ in range(steps if self.rank else 0):
            self.U = torch.linalg.qr(R @ self.VA.T).Q
            self.V = self.U.T @ R
            self.VA = self.V @ self.A

    def removed_from(self, R: Tensor) -> Tensor:
        """R - L."""
        return torch.addmm(R, self.U, self.V, alpha=-1) if self.rank else R


def admm(
    W0: Tensor,
    A: Tensor,
    spectrum: tuple[Tensor, Tensor],
    keep: Callable[[Tensor], Tensor],
    penalty: Penalty,
    iterations: int,
    low_rank: LowRank,
) -> tuple[Tensor, int]:
    """Finds the sparse term's weights, near the pattern but dense.

    Args:
        W0: [d_out, d_in].
        A: [d_in, d_in].
        spectrum: m [d_in] and Q [d_in, d_in] of A.
        keep: magnitudes [d_out, d_in] -> bool mask, the projection onto the pattern.
        penalty: how rho goes.
        iterations: at most.
        low_rank: L, fitted to W0 at rank 0 or more; left fitted to W0 - D.

    Returns:
        B [d_out, d_in] and the number of iterations.
    """
    W0A = W0 @ A
    B = low_rank.removed_from(W0)
    start = torch.where(keep(B.abs()), B, 0)
    D, V, rho = start, torch.zeros_like(W0), penalty.first
    solve = _resolvent(spectrum, rho, tall=len(W0) >= len(A))
    support, moving = D != 0, not penalty.search
    size = int(support.sum())
    for step in range(1, iterations + 1):
        target = torch.addmm(W0A, low_rank.U, low_rank.VA, alpha=-1) if low_rank.rank else W0A  # (W0 - L) A
        B = solve(target - V + rho * D)
        Z = B + V / rho
        D = torch.where(keep(Z.abs()), Z, 0)
        V = V + rho * (B - D)
        low_rank.fit(W0 - D)
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
        elif moved == 0 or (step >= SETTLED_AFTER and moved < penalty.settled * size):
            break
        else:
            rho = min(MOST_RHO, rho * next(factor for share, factor in penalty.growth if moved >= share * size))
        solve = _resolvent(spectrum, rho, tall=len(W0) >= len(A))
    return B, step


def _resolvent(spectrum: tuple[Tensor, Tensor], rho: float, tall: bool) -> Callable[[Tensor], Tensor]:
    """G -> G (A + rho I)^-1: by two products, or for tall G by one with the inverse, whose making then costs less."""
    m, Q = spectrum
    if tall:
        inverse = (Q / (m + rho)) @ Q.T
        return lambda G: G @ inverse
    return lambda G: (G @ Q / (m + rho)) @ Q.T


def conjugate_gradients(W: Tensor, W0: Tensor, A: Tensor, mask: Tensor, iterations: int) -> Tensor:
    """Lowers tr((W - W0) A (W - W0)^T) on a mask, row by row: residuals and directions are zeroed off it.

    Args:
        W: [d_out, d_in], where to start; zero off the mask.
        W0: [d_out, d_in], the goal.
        A: [d_in, d_in], positive definite with near unit diagonal, which stands for the preconditioner.
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
