"""int8 rounding of a decomposition W ~ S + U V that a method has found, for the same output error

    tr((W - S - U V) H (W - S - U V)^T)

U and V are balanced and rounded to nearest. S is refitted on its support to W - U V by conjugate gradients, and then rounded by
coordinate descent: each column in turn takes the whole numbers that are best for the error, given all other columns. Where only
the diagonal of H is known, S is W - U V on its support, rounded to nearest.

H is scaled to unit diagonal, giving A, and damped, as in ``vitoats.methods.oats_h``.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vitoats.format.decomposition import Decomposition
from vitoats.format.int8 import LEVELS, Rounded, dequantized, round_rows, rounded_factors, row_scales
from vitoats.methods.admm import conjugate_gradients
from vitoats.methods.hessian import DAMPING
from vitoats.methods.registry import measured
from vitoats.methods.statistics import InputStatistics, check_finite

REFIT_ITERATIONS = 12  # of conjugate gradients
SWEEPS = 2  # of coordinate descent
COLUMNS = 64  # rounded in one go, before their effect on all others is computed by one product


@dataclass(frozen=True)
class Int8Decomposition:
    """A rounded decomposition.

    Attributes:
        S, U, V: int8 [d_out, d_in], [d_out, r] and [r, d_in], and the scales of their rows.
        error: the same in floating point, with its error.
    """

    S: Rounded
    U: Rounded
    V: Rounded
    error: Decomposition


def quantized(weight: Tensor, statistics: InputStatistics, found: Decomposition, damping: float = DAMPING) -> Int8Decomposition:
    """Rounds a decomposition of one weight matrix.

    Args:
        weight: W [d_out, d_in].
        statistics: moments of the layer's input.
        found: its decomposition; entries of S that are zero stay zero.
        damping: added to the unit diagonal of the scaled H.

    Raises:
        InputError: a weight or moment is not finite.
    """
    check_finite(weight, statistics)
    check_finite(torch.cat([found.S.flatten(), found.U.flatten(), found.V.flatten()]), statistics)
    U, V = rounded_factors(found.U.float(), found.V.float())
    rest = weight.float() - dequantized(*U) @ dequantized(*V)
    kept = found.S != 0
    if statistics.H is None:
        S = round_rows(torch.where(kept, rest, 0))
    else:
        S = _rounded_on_support(found.S.float(), rest, kept, statistics, damping)
    error = measured(weight, statistics, dequantized(*S), dequantized(*U), dequantized(*V), found.steps)
    return Int8Decomposition(S, U, V, error)


def _rounded_on_support(S: Tensor, target: Tensor, kept: Tensor, statistics: InputStatistics, damping: float) -> Rounded:
    """Refits and rounds S [d_out, d_in] to the target, on the mask of what is kept."""
    correlation = statistics.correlation
    scale = correlation.scale.to(S)
    A = correlation.A + damping * torch.eye(len(scale), device=S.device)
    S = conjugate_gradients(S * scale, target * scale, A, kept, REFIT_ITERATIONS) / scale
    steps = row_scales(S)
    return coordinate_descent(S, target, A, scale, kept, steps), steps


def coordinate_descent(S: Tensor, target: Tensor, A: Tensor, scale: Tensor, kept: Tensor, steps: Tensor) -> Tensor:
    """Rounds S to whole numbers times its rows' steps, for a small tr((S - target) D A D (S - target)^T), D = diag(scale).

    Args:
        S: [d_out, d_in], the starting point; zero where nothing is kept.
        target: [d_out, d_in].
        A: [d_in, d_in], with a positive diagonal.
        scale: [d_in].
        kept: bool [d_out, d_in].
        steps: [d_out], positive.

    Returns:
        int8 [d_out, d_in], never worse than S rounded to nearest.
    """
    levels = (S / steps[:, None]).round().clamp(-LEVELS, LEVELS)
    G = ((target - levels * steps[:, None]) * scale) @ A  # minus half the gradient, by scaled weights
    for _ in range(SWEEPS):
        for start in range(0, A.shape[0], COLUMNS):
            block = slice(start, start + COLUMNS)
            moved = _sweep(levels[:, block], G[:, block], A[block, block], scale[block], kept[:, block], steps)
            G -= moved @ A[block]
    return levels.to(torch.int8)


def _sweep(levels: Tensor, G: Tensor, A: Tensor, scale: Tensor, kept: Tensor, steps: Tensor) -> Tensor:
    """Takes each column once; ``levels`` [d_out, n] change in place, and ``G`` [d_out, n] stays.

    Returns:
        by how much each scaled weight grew, [d_out, n].
    """
    G = G.T.contiguous()  # columns as rows, for speed
    moved = torch.zeros_like(G)
    for j in range(len(G)):
        step = steps * scale[j]
        best = (levels[:, j] + G[j] / (A[j, j] * step)).round().clamp(-LEVELS, LEVELS)
        best = torch.where(kept[:, j], best, levels[:, j])
        moved[j] = (best - levels[:, j]) * step
        levels[:, j] = best
        G[j + 1 :] -= A[j, j + 1 :, None] * moved[j]
    return moved.T
