"""Shared by the methods that use the full second moment: damping, the factor of the inverse, and the exact refit.

For one row w of W the layer's output error is (w' - w) H (w' - w)^T with H = X^T X / n_tokens (``vitoats.methods.statistics``),
so H is the Hessian of that error up to a factor of 2, which affects neither masks nor updates. Everything here is float64.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vitoats.common import linalg
from vitoats.common.errors import InputError
from vitoats.methods.statistics import InputStatistics, check_finite

DAMPING = 0.01  # share of the mean of diag(H), as in the published code of SparseGPT
REFIT_BYTES = 32_000_000  # the refit solves as many rows at once as fit into this; larger batches are slower on a CPU


@dataclass(frozen=True)
class Problem:
    """One layer's least-squares problem: minimise ||(W' - W) chol(H)||_F^2 under constraints on W'.

    Attributes:
        W: [d_out, d_in], float64; columns of dead inputs are zero.
        H: [d_in, d_in], float64, damped, positive definite.
    """

    W: Tensor
    H: Tensor


def check_damping(damping: float) -> None:
    """Refuses a damping that is negative or not finite.

    Raises:
        InputError: ``damping`` is negative or not finite.
    """
    if not 0 <= damping < float("inf"):
        raise InputError(f"damping {damping:g} is out of range: give a number of 0 or more, say damping={DAMPING}")


def damped_problem(weight: Tensor, statistics: InputStatistics, damping: float) -> Problem:
    """Prepares a layer as the published code of SparseGPT does.

    Inputs that were always zero get zero weights and H_jj = 1; then H += damping * mean(diag H) * I.

    Args:
        weight: W [d_out, d_in].
        statistics: moments of the layer's input, including H.
        damping: as a share of the mean of diag(H).

    Raises:
        InputError: a weight or moment is not finite.
    """
    check_finite(weight, statistics)
    H = statistics.full.clone()
    dead = H.diagonal() == 0
    H.diagonal()[dead] = 1
    H.diagonal().add_(max(damping * H.diagonal().mean().item(), statistics.round_off))
    return Problem(torch.where(dead, 0, weight.double()), H)


def cholesky(H: Tensor) -> Tensor:
    """The lower factor C of H = C C^T, for H [..., n, n].

    Raises:
        InputError: H is not positive definite.
    """
    C, failed = linalg.cholesky_ex(H)
    if failed.any():
        raise InputError("the inputs' second moment is singular: raise `damping`, or calibrate on more varied `images`")
    return C


def inverse_factor(H: Tensor) -> Tensor:
    """The upper factor R of H^-1 = R^T R [d_in, d_in].

    R_jj^2 is the first diagonal entry of inv(H[j:, j:]), and R[j, j:] / R_jj is its first row divided by that entry. They give
    the cost of removing input j and its effect on the inputs after it, with those before it frozen.
    """
    return cholesky(linalg.cholesky_inverse(cholesky(H))).mT


def refit(problem: Problem, mask: Tensor) -> Tensor:
    """The best weights on a mask, row by row: w_K = H_KK^-1 (H w)_K and 0 elsewhere, where K are the row's kept inputs.

    This is the joint optimum of "multiple removal" (arXiv 2410.15567; arXiv 2412.12441, equation 11): it equals
    w - inv(H)[:, P] inv(inv(H)[P, P]) w_P, where P are the removed inputs. Rows are solved in batches of at most
    ``REFIT_BYTES``. If rows keep different numbers of inputs, the shorter ones are padded with an identity matrix and zeros.

    Args:
        problem: W [d_out, d_in] and H.
        mask: bool [d_out, d_in].

    Returns:
        W' [d_out, d_in].
    """
    W, H = problem.W, problem.H
    target = W @ H  # (H w)^T, row by row
    counts = mask.sum(dim=1)
    rows = counts.argsort(stable=True)  # similar counts together, to limit padding
    fitted = torch.zeros_like(W)
    largest = int(counts.max())
    if largest == 0:
        return fitted
    for batch in rows.split(max(1, REFIT_BYTES // (2 * 8 * largest * largest))):
        k = int(counts[batch].max())
        kept = mask[batch].to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :k]  # [b, k], columns
        real = torch.arange(k, device=W.device) < counts[batch, None]  # [b, k], False where padded
        H_KK = torch.where(real[:, :, None] & real[:, None, :], H[kept[:, :, None], kept[:, None, :]], 0)  # [b, k, k]
        H_KK.diagonal(dim1=1, dim2=2).add_((~real).to(H.dtype))
        right = torch.where(real, target[batch].gather(1, kept), 0)
        solved = linalg.cholesky_solve(right[:, :, None], cholesky(H_KK)).squeeze(2)
        fitted[batch] = torch.zeros_like(fitted[batch]).scatter_(1, kept, solved)
    return fitted
