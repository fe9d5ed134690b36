"""OATS: outlier-aware sparse + low-rank decomposition (Zhang and Papyan, arXiv 2409.13652, ICLR 2025).

With D = diag(sqrt(second_moment)), the roots of the inputs' second moments over the calibration tokens, OATS minimises

    || W D - S' - L' ||_F^2   subject to   rank(L') <= r  and  k non-zeros in each group of S'

by alternating exact projections, starting with the SVD and ending with the threshold. It returns S = S' / D, U V = L' / D.
At rank 0 this is Wanda (one threshold of |W| D); without S it is the activation-weighted SVD.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from vitoats.common import linalg
from vitoats.common.errors import InputError
from vitoats.methods.budget import LayerBudget, SparseLowRankConfig, check_iterations
from vitoats.methods.registry import Decomposition, magnitude_of, register
from vitoats.methods.sparsity import Pattern, WarmThreshold
from vitoats.methods.statistics import InputStatistics, check_finite

FIRST_POWER_STEPS = 16  # subspace iterations in place of the first SVD; each later step takes one


Solver = Literal["fast", "exact"]


@dataclass(frozen=True, kw_only=True)
class OATSConfig(SparseLowRankConfig):
    """Settings of OATS; the defaults are the paper's for vision models.

    Attributes:
        rank_ratio, pattern: 0.2 and "row" by default.
        iterations: maximum number of alternating steps.
        solver: "exact" takes a full SVD and an exact threshold each step, as published. "fast" takes one warm-started
            subspace iteration and a warm-started threshold instead, in a fraction of the time.
        tolerance: stop when a step lowers the objective by less than this share of it; 0 disables this. The exact solver
            always takes all steps, as published.
        seed: seed of the subspace's random start.
    """

    iterations: int = 80
    solver: Solver = "fast"
    tolerance: float = 1e-4
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        check_iterations(self.iterations)
        if self.solver not in get_args(Solver):
            raise InputError(f"unknown solver {self.solver!r}: use fast or exact")
        if not 0 <= self.tolerance < 1:
            raise InputError(f"tolerance {self.tolerance:g} is out of range: `tolerance` takes a number from 0 up to but not 1")

    def multiply_adds(self, d_out: int, d_in: int) -> int:
        """Upper bound for one matrix: the projections on low rank, and two products with H, which measure the error.

        An SVD of [m, n] with m >= n counts 3 m n^2 + 10 n^3 (Golub and Van Loan, Matrix Computations, section 8.6), a QR with
        its Q 2 m n^2.
        """
        rank, error = self.budget(d_out, d_in).rank, 2 * d_out * d_in**2
        if self.solver == "exact":
            m, n = max(d_out, d_in), min(d_out, d_in)
            return error + (self.iterations * (3 * m * n**2 + 10 * n**3 + rank * m * n) if rank else 0)
        subspace = 2 * rank * d_out * d_in + 2 * d_out * rank**2
        steps = (self.iterations + FIRST_POWER_STEPS - 1) * subspace + self.iterations * rank * d_out * d_in
        return error + steps + 3 * d_in * rank**2 + 10 * rank**3 + d_out * rank**2  # ends with an SVD of the right factor


@register("oats", OATSConfig, needs="diagonal")
def oats(weight: Tensor, statistics: InputStatistics, config: OATSConfig) -> Decomposition:
    """Decomposes one weight matrix.

    Args:
        weight: W [d_out, d_in], float32 or float64; the result has its dtype.
        statistics: second_moment [d_in]; only ratios between inputs matter.
        config: the settings.

    Returns:
        S, U and V, with the error that OATS minimises, ||(W - S - U V) D||_F^2, and its root over ||W D||_F. Inputs that were
        always zero get zero weights, so no budget is spent on them.

    Raises:
        InputError: a weight or second moment is not finite, or nothing would be left of the layer.
    """
    check_finite(weight, statistics)
    second_moment = statistics.second_moment
    pattern = Pattern.parse(config.pattern)
    budget = config.budget(*weight.shape)

    scale = second_moment.double().clamp(min=0).sqrt()
    if scale.max() == 0:  # every input is always zero, so all are treated alike
        scale = torch.ones_like(scale)
    scale = scale / scale.max()
    alive = scale > torch.finfo(weight.dtype).tiny
    D = torch.where(alive, scale, 0).to(weight.dtype)
    A = weight * D  # W D
    size = magnitude_of(A)
    A = A / size

    if budget.rank == 0:
        S, Q, B, steps = (
            threshold(A, pattern, budget.kept_per_group),
            A.new_zeros(A.shape[0], 0),
            A.new_zeros(0, A.shape[1]),
            1,
        )
    elif budget.kept_per_group == 0:
        S, (Q, B), steps = torch.zeros_like(A), truncated_svd(A, budget.rank), 1
    elif config.solver == "exact":
        S, Q, B, steps = alternate_exact(A, pattern, budget, config)
    else:
        S, Q, B, steps = alternate_fast(A, pattern, budget, config)

    residual = A - S - Q @ B
    objective = residual.double().square().sum().item()
    total = A.double().square().sum().item()
    inverse = torch.where(alive, 1 / scale.clamp(min=torch.finfo(weight.dtype).tiny), 0).to(weight.dtype)
    unit = second_moment.double().max().item() or 1.0  # back to the caller's scale of D
    return Decomposition(
        S=S * size * inverse,
        U=Q * size,
        V=B * inverse,
        objective=objective * size**2 * unit,
        relative_error=(objective / total) ** 0.5 if total > 0 else 0.0,
        steps=steps,
    )


def threshold(R: Tensor, pattern: Pattern, kept: int) -> Tensor:
    """The nearest matrix to R [d_out, d_in] with ``kept`` non-zeros in each group."""
    return torch.where(pattern.keep(R.abs(), kept), R, 0)


def truncated_svd(A: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best rank-r approximation of A [m, n] as (U diag(sigma) [m, r], V^T [r, n])."""
    if A.shape[0] < A.shape[1]:  # LAPACK is faster on the tall transpose
        V, sigma, Ut = linalg.svd(A.T, full_matrices=False)
        return Ut[:rank].T * sigma[:rank], V[:, :rank].T
    U, sigma, Vt = linalg.svd(A, full_matrices=False)
    return U[:, :rank] * sigma[:rank], Vt[:rank]


def alternate_exact(A: Tensor, pattern: Pattern, budget: LayerBudget, config: OATSConfig) -> tuple[Tensor, Tensor, Tensor, int]:
    """The published steps: L <- SVD_r(A - S), S <- threshold(A - L). The objective never rises.

    Returns:
        S [m, n], U diag(sigma) [m, r], V^T [r, n], and the number of steps.
    """
    S = torch.zeros_like(A)
    for _ in range(config.iterations):
        U, Vt = truncated_svd(A - S, budget.rank)
        S = threshold(A - U @ Vt, pattern, budget.kept_per_group)
    return S, U, Vt, config.iterations


def alternate_fast(A: Tensor, pattern: Pattern, budget: LayerBudget, config: OATSConfig) -> tuple[Tensor, Tensor, Tensor, int]:
    """The same steps with approximate projections, each started from the previous one.

    A - S changes little between steps, so one subspace iteration from the last right factor B tracks its leading singular
    vectors:  Q <- qr((A - S) B^T),  B <- Q^T (A - S),  L = Q B.  Likewise for the threshold (``WarmThreshold``). All passes
    write into buffers that are allocated once: on a CPU, fresh memory costs more than the arithmetic.

    Returns:
        S [m, n], Q B in the form U diag(sigma) [m, r] and V^T [r, n], and the number of steps.
    """
    A = A.contiguous()
    start = torch.randn(A.shape[1], budget.rank, generator=torch.Generator().manual_seed(config.seed), dtype=A.dtype).to(
        A.device
    )
    B = start.T
    S, R, magnitudes, mask = torch.zeros_like(A), torch.empty_like(A), torch.empty_like(A), torch.empty_like(A)
    warm = WarmThreshold(budget.kept_per_group)
    objective = float("inf")
    for step in range(1, config.iterations + 1):
        torch.sub(A, S, out=R)
        for _ in range(FIRST_POWER_STEPS if step == 1 else 1):
            Q = linalg.qr(R @ B.T).Q
            B = Q.T @ R
        torch.addmm(A, Q, B, alpha=-1, out=R)  # the rest, for S
        if step == config.iterations:
            break
        torch.abs(R, out=magnitudes)
        if pattern.kind in ("N:M", "block"):
            mask.copy_(pattern.keep(magnitudes, budget.kept_per_group))
            torch.mul(R, mask, out=S)
            surplus = 0.0
        else:
            marked = warm.mark(pattern.groups(magnitudes), pattern.groups(mask))
            torch.mul(R, mask, out=S)
            # first-order effect on the objective of a few entries too many or too few
            surplus = ((marked - budget.kept_per_group) * warm.threshold.square()).sum().item()
        if config.tolerance:
            torch.sub(R, S, out=mask)
            last, objective = objective, torch.dot(mask.view(-1), mask.view(-1)).item() + surplus
            if last - objective < config.tolerance * objective:
                break
    S = threshold(R, pattern, budget.kept_per_group)
    U, sigma, Vt = linalg.svd(B, full_matrices=False)
    return S, Q @ (U * sigma), Vt, step
