"""ADMM for a layer's weights under a sparsity pattern and an optional low-rank term, and conjugate gradients on the support.

    min tr((W0 - D - L) A (W0 - D - L)^T)    subject to    D in the pattern,  rank(L) <= r

A [d_in, d_in] is positive definite with a nearly unit diagonal, and is decomposed once, A = Q diag(m) Q^T. ADMM splits the
sparse term into B, which minimises the objective, and D, which satisfies the pattern. Each iteration is

    B <- ((W0 - L) A - V + rho D) Q diag(1 / (m + rho)) Q^T
    D <- projection of B + V / rho onto the pattern
    V <- V + rho (B - D)
    L <- best rank-r approximation of W0 - B

and rho grows as the support of D settles ("support-driven"). Without L this is the ADMM of ALPS (arXiv 2406.07831). L starts at
0 and is fitted to W0 - B, as in 3BASiL (arXiv 2603.01376); in a short schedule it does better if it starts at its best for W0
and is fitted to W0 - D, which is what S will become.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vitoats.common import linalg
from vitoats.common.ranks import row_by_row

FIRST_STEPS = 16  # subspace iterations from a random start
LOOK_EVERY = 3  # iterations between two checks of the support
SETTLED_AFTER = 30  # iterations before a settled support may stop ADMM
MOVING = 0.005  # share of the support that must change before a rho under search may grow
LEAST_RHO, MOST_RHO = 1e-6, 1e6


@dataclass(frozen=True)
class Penalty:
    """The schedule of rho.

    Attributes:
        first: the initial rho.
        settled: the iterations end when less than this share of the support has changed.
        growth: (share, factor) pairs: rho grows by the factor of the first pair whose share of the support has changed.
        short: whether L starts at its best for W0 and is fitted to W0 - D, instead of at 0 and to W0 - B.
        search: first divide rho by 5 until more than ``MOVING`` of the support changes between two checks, restarting whenever
            any of it changed; give up below ``LEAST_RHO``.
    """

    first: float
    settled: float
    growth: tuple[tuple[float, float], ...]
    short: bool = False
    search: bool = False


# Found by trial: docs/oats-h.md, Constants
PENALTIES = {
    "alps": Penalty(0.1, 3e-4, ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1)), search=True),  # as in its published code
    "slow": Penalty(0.01, 5e-3, ((0.1, 1.1), (0.005, 1.05), (0.0, 1.02))),
    "fast": Penalty(0.02, 5e-3, ((0.1, 1.2), (0.005, 1.1), (0.0, 1.05)), short=True),
}


class LowRank:
    """The best rank-r L = U V in the metric A, updated by subspace iteration as the matrix R that it approximates changes.

    The leading left singular vectors of R A^(1/2) are those of R A R^T, and with U spanning them the best L is U U^T R. One
    step is therefore  U <- qr(R A V^T),  V <- U^T R,  which needs neither a square root of A nor its inverse.
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
            self.U = linalg.qr(R @ self.VA.T).Q
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
    """Finds the weights of the sparse term, close to the pattern but still dense.

    Args:
        W0: [d_out, d_in].
        A: [d_in, d_in].
        spectrum: m [d_in] and Q [d_in, d_in] of A.
        keep: magnitudes [d_out, d_in] -> bool mask, the projection onto the pattern.
        penalty: the schedule of rho.
        iterations: maximum number of iterations.
        low_rank: L, its rank may be 0; fitted to W0 - D on return.

    Returns:
        B [d_out, d_in] and the number of iterations.
    """
    W0A, work = W0 @ A, W0.numel() * len(A)
    if penalty.short:
        low_rank.fit(W0, FIRST_STEPS)
    B = low_rank.removed_from(W0)
    start = torch.where(keep(B.abs()), B, 0)
    D, V, rho = start, torch.zeros_like(W0), penalty.first
    solve = _resolvent(spectrum, rho, tall=len(W0) >= len(A))
    support, moving = D != 0, not penalty.search
    size = int(support.sum())
    for step in range(1, iterations + 1):
        target = torch.addmm(W0A, low_rank.U, low_rank.VA, alpha=-1) if low_rank.rank else W0A  # (W0 - L) A
        B = row_by_row(solve, target - V + rho * D, work=work)
        Z = B + V / rho
        D = torch.where(keep(Z.abs()), Z, 0)
        V = V + rho * (B - D)
        low_rank.fit(W0 - (D if penalty.short else B))
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
    if not penalty.short:
        low_rank.fit(W0 - D)
    return B, step


def _resolvent(spectrum: tuple[Tensor, Tensor], rho: float, tall: bool) -> Callable[[Tensor], Tensor]:
    """G -> G (A + rho I)^-1 by two products; for tall G, where forming the inverse is cheaper, by one."""
    m, Q = spectrum
    if tall:
        inverse = (Q / (m + rho)) @ Q.T
        return lambda G: G @ inverse
    return lambda G: (G @ Q / (m + rho)) @ Q.T


def conjugate_gradients(W: Tensor, W0: Tensor, A: Tensor, mask: Tensor, iterations: int) -> Tensor:
    """Reduces tr((W - W0) A (W - W0)^T) on a mask, row by row; residuals and directions are zero off the mask.

    Args:
        W: [d_out, d_in], the starting point; zero off the mask.
        W0: [d_out, d_in], the weights to approximate.
        A: [d_in, d_in], positive definite; its nearly unit diagonal replaces a preconditioner.
        mask: bool [d_out, d_in].
        iterations: number of iterations.
    """
    R = torch.where(mask, (W0 - W) @ A, 0)  # minus half the gradient
    P, energy = R, R.square().sum(dim=1, keepdim=True)
    for _ in range(iterations):
        AP = torch.where(mask, P @ A, 0)
        alpha = (energy / (P * AP).sum(dim=1, keepdim=True)).nan_to_num(0.0, posinf=0.0)  # converged rows stay as they are
        W = W + alpha * P
        R = R - alpha * AP
        last, energy = energy, R.square().sum(dim=1, keepdim=True)
        P = R + (energy / last).nan_to_num(0.0, posinf=0.0) * P
    return W
