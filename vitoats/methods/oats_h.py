"""OATS-H: sparse + low rank for the layer's true output error, OATS (arXiv 2409.13652) with the full second moment.

    min tr((W - S - U V) H (W - S - U V)^T)    subject to    rank(U V) <= r  and  S in the pattern

which is ||X (W - S - U V)^T||_F^2 / n_tokens. OATS uses only the diagonal of H. Here H is scaled to unit diagonal, giving A,
and damped by ``damping`` I, which is equivalent to shrinking it towards OATS' diagonal. The support of S comes from ADMM with
the low-rank term inside (``vitoats.methods.admm``). For a sparse term alone this is ALPS (arXiv 2406.07831); for one with a
low-rank term, compare 3BASiL (arXiv 2603.01376). Then S is refitted on its support by conjugate gradients and U V by subspace
iteration, in turn, and the result with the smallest damped error is kept.

The "support" solver starts the same refit from OATS' support and low-rank term, which is cheaper and gives most of the gain.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from vitoats.common.errors import InputError
from vitoats.common.ranks import row_by_row
from vitoats.methods.admm import FIRST_STEPS, PENALTIES, LowRank, admm, conjugate_gradients
from vitoats.methods.budget import SparseLowRankConfig, check_iterations
from vitoats.methods.hessian import DAMPING, check_damping
from vitoats.methods.oats import OATSConfig, alternate_fast, threshold
from vitoats.methods.registry import Decomposition, Recipe, magnitude_of, measured, register
from vitoats.methods.sparsity import Pattern
from vitoats.methods.statistics import InputStatistics, check_finite

REFIT_STEPS = 2  # subspace iterations per round of the refit
EIGENVECTORS = 5  # multiply-adds of an eigendecomposition, in units of d_in^3

Solver = Literal["admm", "support"]


@dataclass(frozen=True, kw_only=True)
class OATSHConfig(SparseLowRankConfig):
    """Settings of OATS-H.

    Attributes:
        rank_ratio, pattern: 0.25 and "layer" by default.
        iterations: maximum number of iterations of ADMM, or of OATS for the "support" solver.
        solver: "admm", or "support" for OATS' support.
        penalty: how ADMM's penalty grows, "slow", "fast" (in half the iterations) or "alps".
        refit_rounds: how often S and U V are refitted in turn.
        refit_iterations: conjugate gradient iterations per round.
        damping: added to the unit diagonal of the scaled H.
        seed: seed of the low-rank term's random start.
    """

    rank_ratio: float = 0.25
    pattern: str = "layer"
    iterations: int = 300
    solver: Solver = "admm"
    penalty: str = "slow"
    refit_rounds: int = 3
    refit_iterations: int = 6
    damping: float = DAMPING
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        check_iterations(self.iterations)
        if self.solver not in get_args(Solver):
            raise InputError(f"unknown solver {self.solver!r}: use admm or support")
        if self.penalty not in PENALTIES:
            raise InputError(f"unknown penalty {self.penalty!r}: use {', '.join(PENALTIES)}")
        if self.refit_rounds < 1 or self.refit_iterations < 0:
            raise InputError("refit_rounds takes 1 or more, refit_iterations 0 or more")
        check_damping(self.damping)

    def multiply_adds(self, d_out: int, d_in: int) -> int:
        """Upper bound for one matrix: the products of ADMM and the refit with A, and with the low-rank factors."""
        rank = self.budget(d_out, d_in).rank
        product = d_out * d_in**2  # with A
        low_rank = rank * (d_in**2 + 4 * d_out * d_in)  # a subspace iteration
        refit = self.refit_rounds * ((self.refit_iterations + 2) * product + REFIT_STEPS * low_rank)
        total = (self.iterations + FIRST_STEPS) * low_rank + refit + 2 * product  # the last two measure the error
        if self.solver == "admm":
            total += self.iterations * (1 if d_out >= d_in else 2) * product + EIGENVECTORS * d_in**3
        return total


RECIPE = Recipe(target="residual", refit_bias=True, allocation="sensitivity", calibration_mix="synthetic")


@register("oats-h", OATSHConfig, needs="full", recipe=RECIPE)
def oats_h(weight: Tensor, statistics: InputStatistics, config: OATSHConfig) -> Decomposition:
    """Decomposes one weight matrix.

    Args:
        weight: W [d_out, d_in].
        statistics: moments of the layer's input, including H.
        config: the settings.

    Raises:
        InputError: a weight or moment is not finite, or the pattern or budget does not fit.
    """
    check_finite(weight, statistics)
    correlation = statistics.correlation
    alive = correlation.A.diagonal() > 0
    scale = correlation.scale.to(weight.device)
    W = torch.where(alive, weight.double() * scale, 0)
    unit = magnitude_of(W)
    W = (W / unit).float()
    A = correlation.A + config.damping * torch.eye(len(scale), device=weight.device)
    budget, pattern = config.budget(*weight.shape), Pattern.parse(config.pattern)

    def keep(magnitudes: Tensor) -> Tensor:
        return pattern.keep(magnitudes, budget.kept_per_group)

    low_rank = LowRank(A, len(W), budget.rank, config.seed)
    if config.solver == "support" and budget.rank and budget.kept_per_group:
        oats = OATSConfig(
            compression=config.compression, rank_ratio=config.rank_ratio, pattern=config.pattern, iterations=config.iterations
        )
        S, low_rank.U, low_rank.V, steps = alternate_fast(W, pattern, budget, oats)
        low_rank.VA = low_rank.V @ A
        mask = S != 0
    else:
        if config.solver == "support" or budget.kept_per_group == 0:
            low_rank.fit(W, FIRST_STEPS)
            S, steps = threshold(low_rank.removed_from(W), pattern, budget.kept_per_group), 1
        else:
            m, Q = correlation.spectrum
            S, steps = admm(W, A, (m + config.damping, Q), keep, PENALTIES[config.penalty], config.iterations, low_rank)
        mask = keep(S.abs())
    S, U, V = refit(torch.where(mask, S, 0), W, A, mask, low_rank, config)
    return measured(weight, statistics, S * (unit / scale), U, V * (unit / scale), steps=steps)


def refit(
    S: Tensor, W: Tensor, A: Tensor, mask: Tensor, low_rank: LowRank, config: OATSHConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """Refits S on its support and the low-rank term in turns.

    Args:
        S: [d_out, d_in], zero off the mask.
        W: [d_out, d_in].
        A: [d_in, d_in], damped.
        mask: bool [d_out, d_in].
        low_rank: the low-rank term; changed in place.
        config: the settings.

    Returns:
        the S [d_out, d_in], U [d_out, r] and V [r, d_in] with the smallest damped error.
    """

    def conjugate(S: Tensor, W0: Tensor, mask: Tensor) -> Tensor:
        return conjugate_gradients(S, W0, A, mask, config.refit_iterations)

    best = float("inf"), S, low_rank.U, low_rank.V
    for turn in range(config.refit_rounds):
        if turn:
            low_rank.fit(W - S, REFIT_STEPS)
        S = row_by_row(conjugate, S, low_rank.removed_from(W), mask, work=config.refit_iterations * W.numel() * len(A))
        E = low_rank.removed_from(W) - S
        error = ((E @ A) * E).sum().item()
        if error < best[0]:
            best = error, S, low_rank.U, low_rank.V
    return best[1:]
