"""Numerical Pruning: heads and neurons by one quadratic program per module (Shen et al., arXiv 2412.12441, AAAI 2025).

X [n_tokens, D] is the input of a module's output layer W [d_out, D]: all heads side by side, or the hidden neurons. The mask of
the D columns is relaxed to z, whose sum should be r = (1 - rho) D:

    min_z  1/2 sum_i || X (w_i - z o w_i) ||^2  +  lambda/2 (1^T z - r)^2,    w_i the rows of W
    A = (W^T W) o (X^T X),    gradient A (z - 1) + lambda (1^T z - r) 1,    Hessian A + lambda 1 1^T

and z holds the columns' scores. The objective is quadratic, so one Newton step from anywhere gives the same result as fifty:

    u = A^-1 1,   s = 1^T u,   z = 1 - lambda (D - r) / (1 + lambda s) u,    lambda -> inf:  z = 1 - (D - r) u / s

Within a module, columns are ranked by -u, whatever lambda and rho are. The scores of all modules are then cut at one threshold,
and the remaining columns of W are refitted by least squares (``compensated``).

Our choices where the paper's main text is silent:

* lambda is infinite, so the sum holds exactly; a finite lambda is used with X scaled to spectral norm 1.
* A is damped by 1e-4 of its mean diagonal.
* The threshold is where the kept *weights* add up to the requested number (``cut="weighted"``). Read literally, the paper
  multiplies head scores by the ratio of a head's weights to a neuron's, and counts all units alike (``cut="literal"``).
* A bias, which the paper's models lack, is refitted with W.
* For the refit, X is measured again behind the blocks that are already pruned.
"""

from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from vitoats.common import linalg
from vitoats.common.errors import InputError
from vitoats.methods.hessian import DAMPING, check_damping, cholesky
from vitoats.methods.registry import output_error, register_structural
from vitoats.methods.statistics import InputStatistics, check_finite

SCORE_DAMPING = 1e-4  # share of the mean of diag(A)
CHOICES = {
    "head_score": ("mean", "qp"),
    "cut": ("weighted", "literal", "equal"),
    "compensation": ("sequential", "dense", "none"),
}


@dataclass(frozen=True, kw_only=True)
class NumericalConfig:
    """Settings of Numerical Pruning.

    Attributes:
        compression: rho, the share of the weights of attention and MLPs that is removed.
        iterations: Newton steps; 0 uses the closed form, which gives the same result.
        penalty: lambda; 0 stands for infinity, which JSON does not have.
        head_score: "mean" of a head's columns, as in the paper, or "qp": sum A over each head and solve for heads.
        cut: "weighted" or "literal", see the module's docstring; or "equal": the same number in each module of a kind, so that
            an ordinary configuration describes the model.
        compensation: refit W on inputs behind pruned blocks ("sequential"), on those of the dense model ("dense"), or not
            ("none").
        refit_bias: let the bias absorb the mean of what is removed.
        damping: damping of the refit, as a share of the mean of diag(X^T X).
    """

    compression: float = 0.5
    iterations: int = 0
    penalty: float = 0.0
    head_score: str = "mean"
    cut: str = "weighted"
    compensation: str = "sequential"
    refit_bias: bool = True
    damping: float = DAMPING

    def __post_init__(self):
        if not 0 <= self.compression < 1:
            raise InputError(
                f"compression {self.compression:g} is out of range: `compression` takes the share of weights to remove, "
                f"from 0 up to but not 1"
            )
        if self.iterations < 0:
            raise InputError(f"{self.iterations} iterations cannot be: `iterations` takes 0 (closed form) or more")
        if not 0 <= self.penalty < inf:
            raise InputError(f"penalty {self.penalty:g} is out of range: give a number above 0, or 0 for an infinite one")
        check_damping(self.damping)
        for name, values in CHOICES.items():
            if getattr(self, name) not in values:
                raise InputError(f"{name}={getattr(self, name)} is unknown: use {' or '.join(values)}")


@register_structural("numerical", NumericalConfig)
def numerical(weight: Tensor, statistics: InputStatistics, width: int, config: NumericalConfig) -> Tensor:
    """Scores the units of one module; the lowest are removed first.

    Args:
        weight: W [d_out, D] of the output layer.
        statistics: moments of its input, including H.
        width: consecutive columns per unit: the head's width, or 1 for neurons.
        config: the settings.

    Returns:
        z [D / width], float64; if lambda is infinite, their mean is 1 - rho.

    Raises:
        InputError: a weight or moment is not finite.
    """
    check_finite(weight, statistics)
    H = statistics.full
    if config.penalty:
        H = H / linalg.eigvalsh(H)[-1].clamp(min=torch.finfo(H.dtype).tiny)
    A = removal_costs(weight, H)
    if config.head_score == "qp":
        A = A.unflatten(0, (-1, width)).unflatten(2, (-1, width)).sum(dim=(1, 3))
    A.diagonal().add_(SCORE_DAMPING * A.diagonal().mean().item() or 1.0)  # 1 if the module's output is always zero
    kept, penalty = (1 - config.compression) * len(A), config.penalty or inf
    z = newton(A, kept, penalty, config.iterations) if config.iterations else closed_form(A, kept, penalty)
    return z if config.head_score == "qp" else z.unflatten(0, (-1, width)).mean(dim=1)


def removal_costs(weight: Tensor, H: Tensor) -> Tensor:
    """A = (W^T W) o H [D, D]: removing columns P, without a refit, costs the sum of A[P, P] in output energy."""
    W = weight.to(H)
    return (W.T @ W) * H


def closed_form(A: Tensor, kept: float, penalty: float) -> Tensor:
    """The minimiser z [D], for A [D, D] positive definite and r = kept."""
    u = linalg.cholesky_solve(torch.ones_like(A[:, :1]), cholesky(A)).squeeze(1)
    s = u.sum()
    return 1 - (len(A) - kept) * u / (s if penalty == inf else s + 1 / penalty)


def newton(A: Tensor, kept: float, penalty: float, steps: int) -> Tensor:
    """The same by Newton steps from z = 0, as in the paper; for an infinite penalty, those of the constrained program."""
    ones = torch.ones_like(A[:, 0])
    z = torch.zeros_like(ones)
    hessian = A + penalty
    if penalty == inf:  # a Lagrange multiplier replaces the penalty
        hessian = torch.cat([torch.cat([A, ones[:, None]], 1), torch.cat([ones, ones.new_zeros(1)])[None]])
    factors, pivots = linalg.lu_factor(hessian)
    for _ in range(steps):
        excess = z.sum() - kept
        gradient = torch.cat([A @ (z - 1), excess[None]]) if penalty == inf else A @ (z - 1) + penalty * excess
        z = z - linalg.lu_solve(factors, pivots, gradient[:, None])[: len(z), 0]
    return z


def cut(scores: list[Tensor], weights: list[int], config: NumericalConfig) -> list[Tensor]:
    """Decides which units of all modules stay; the best unit of each module always does.

    By one threshold, unless ``config.cut`` is "equal" (``equal_cut``).

    "weighted" keeps as many of the highest-scoring units as bring their weights closest to (1 - rho) of all weights, within
    half a unit. "literal" multiplies each score by its unit's weights over the smallest unit's and removes the share rho of
    all units, whatever compression that gives.

    Args:
        scores: scores of the units of each module, [n].
        weights: number of weights in one unit of each module.
        config: compression and kind of cut.

    Returns:
        bool [n] for each module.

    Raises:
        InputError: less than one unit of each module would be left.
    """
    if config.cut == "equal":
        return equal_cut(scores, weights, config.compression)
    sizes = torch.cat([torch.full(s.shape, float(w), dtype=torch.float64) for s, w in zip(scores, weights, strict=True)])
    flat = torch.cat([s.double().cpu() for s in scores])
    if config.cut == "literal":
        flat = flat * sizes / min(weights)
    firsts = torch.tensor([0, *(len(s) for s in scores[:-1])]).cumsum(0)
    best = torch.stack([first + s.argmax().cpu() for first, s in zip(firsts, scores, strict=True)])
    flat[best] = inf
    order = flat.argsort(descending=True, stable=True)
    if config.cut == "literal":
        n_kept = max(len(best), len(flat) - int(config.compression * len(flat)))
    else:
        kept_weights = torch.cat([sizes.new_zeros(1), sizes[order].cumsum(0)])
        wanted = (1 - config.compression) * sizes.sum()
        n_kept = int((kept_weights - wanted).abs().argmin())
        if n_kept < len(best):
            lowest = 1 - kept_weights[len(best)] / sizes.sum()
            raise InputError(
                f"compression {config.compression:g} leaves less than one head or neuron of each module: "
                f"lower `compression` to {lowest:.4g} or less"
            )
    keep = torch.zeros(len(flat), dtype=torch.bool, device=order.device)
    keep[order[:n_kept]] = True
    return list(keep.split([len(s) for s in scores]))


def equal_cut(scores: list[Tensor], weights: list[int], compression: float) -> list[Tensor]:
    """Keeps the best units of each module, the same number in all whose units have as many weights.

    The shares are 1 - rho for each kind of unit, rounded; those of the smallest units make up for what the others round.

    Returns:
        bool [n] for each module.
    """
    wanted = (1 - compression) * sum(w * len(s) for s, w in zip(scores, weights, strict=True))
    counts: dict[int, int] = {}
    for weight in sorted(set(weights), reverse=True):
        of_kind = [len(s) for s, w in zip(scores, weights, strict=True) if w == weight]
        share = wanted / weight / len(of_kind) if weight == min(weights) else (1 - compression) * min(of_kind)
        counts[weight] = min(max(1, round(share)), *of_kind)
        wanted -= counts[weight] * weight * len(of_kind)
    masks = [torch.zeros(len(s), dtype=torch.bool) for s in scores]
    for mask, score, weight in zip(masks, scores, weights, strict=True):
        mask[score.cpu().argsort(descending=True, stable=True)[: counts[weight]]] = True
    return masks


def compensated(
    weight: Tensor, bias: Tensor | None, statistics: InputStatistics, kept: Tensor, config: NumericalConfig
) -> tuple[Tensor, Tensor | None, float]:
    """Refits the remaining columns of an output layer to reproduce the output of all of them:

        W_K <- W_K + W_P H_PK H_KK^-1,    b <- b + W_P (mean_P - H_PK H_KK^-1 mean_K),    P the removed columns

    If a bias is refitted, H is centred, H - mean mean^T, which is equivalent to a constant input that always stays. H_KK is
    damped, so W changes little in directions that the inputs do not determine.

    Args:
        weight: W [d_out, D].
        bias: b [d_out], or None, which leaves the mean uncorrected.
        statistics: moments of its input, including H and the mean.
        kept: indices of the remaining columns, [k].
        config: whether and how to refit.

    Returns:
        W_K [d_out, k] and b in their original dtypes, and the relative error of the output (``registry.output_error``).

    Raises:
        InputError: a weight or moment is not finite, or H_KK is singular.
    """
    check_finite(weight, statistics)
    W, mean = weight.double(), statistics.mean
    assert mean is not None
    change = torch.zeros_like(W)  # W' - W
    gone = torch.ones(W.shape[1], dtype=torch.bool, device=W.device)
    gone[kept] = False
    change[:, gone] = -W[:, gone]
    shift = None
    if config.compensation != "none":
        centred = config.refit_bias and bias is not None
        moments = statistics.centred() if centred else statistics
        C = moments.full
        C_KK = C[kept][:, kept]
        dead = C_KK.diagonal() <= 0
        C_KK.diagonal()[dead] = 1
        C_KK.diagonal().add_(moments.ridge(config.damping))
        change[:, kept] = linalg.cholesky_solve(C[kept][:, gone] @ W[:, gone].T, cholesky(C_KK)).T
        shift = -change @ mean if centred else None
    error = output_error(W, change, shift, statistics)
    fitted = (W + change)[:, kept].to(weight.dtype)
    return fitted, bias if shift is None or bias is None else (bias + shift).to(bias.dtype), error
