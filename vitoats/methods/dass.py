"""DaSS: dependency-aware pruning of gated MLPs (arXiv 2405.01943, and its published code).

A gated MLP is y = W_down h with h = act(W_gate x) * (W_up x). Row i of gate and of up and column i of down belong to neuron i,
and all three are scored with the norm of its activations, ||h_i||_2 over the calibration tokens:

    gate, up    score_ij = |W_ij| * ||h_i||^power,   compared within each *column* j
    down        score_ij = |W_ij| * ||h_j||,         compared within each row: Wanda

In gate and up the factor is constant along a row, so comparing within rows would be plain magnitude pruning; within a column,
weights of weak neurons go first. The norm of the input x is not used. Patterns of gate and up therefore run along the other
dimension: "row" keeps the same number of entries in each column, N:M keeps N of M consecutive *neurons* of a column, and blocks
are neighbouring neurons. A packed gate and up are treated as separate matrices. Root mean squares replace the norms, which
gives the same ranking.

The published code prunes MLPs and leaves attention dense; ``attention="wanda"`` prunes it by Wanda at the same budget, to
compare whole models. The paper covers gated MLPs only; ``plain=True`` extends the rule to plain ones, with h the activations
after GELU.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vitoats.common.errors import InputError
from vitoats.methods.budget import SparseConfig
from vitoats.methods.registry import Decomposition, measured, register
from vitoats.methods.statistics import InputStatistics, check_finite
from vitoats.methods.wanda import wanda_score


@dataclass(frozen=True, kw_only=True)
class DaSSConfig(SparseConfig):
    """Settings of DaSS; for gate and up, pattern and budget apply to the transpose.

    Attributes:
        power: the exponent of the neurons' norms; 0.5 in the published code.
        attention: how attention is treated: "dense" or "wanda".
        plain: also prune MLPs without a gate.
    """

    power: float = 0.5
    attention: str = "dense"
    plain: bool = False

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.power < float("inf"):
            raise InputError(f"power {self.power:g} is out of range: give a number of 0 or more, say power=0.5")
        if self.attention not in ("dense", "wanda"):
            raise InputError(f"attention={self.attention} is unknown: use dense or wanda")


def left_dense(role: str, config: DaSSConfig) -> str | None:
    """Why a layer with this role stays dense; None if it is pruned.

    Raises:
        InputError: the layer is in an MLP without a gate, and ``plain`` is not set.
    """
    if role == "plain MLP" and not config.plain:
        raise InputError("this model's MLPs have no gate, which DaSS is made for: use `method='wanda'`, or add `plain=true`")
    return None if role.endswith("MLP") or config.attention == "wanda" else "DaSS prunes MLPs only"


@register("dass", DaSSConfig, needs="neurons", left_dense=left_dense)
def dass(weight: Tensor, statistics: InputStatistics, config: DaSSConfig) -> Decomposition:
    """Keeps the weights with the largest scores.

    Args:
        weight: W [d_out, d_in]; a packed gate and up are stacked, [2 * n, d_in].
        statistics: second_moment [d_in]; for gate and up, also neurons [n].
        config: the settings.

    Raises:
        InputError: a weight or moment is not finite, or the pattern or budget does not fit.
    """
    check_finite(weight, statistics)
    if statistics.neurons is None:
        mask = config.mask(wanda_score(weight, statistics))
    else:
        parts = weight.split(len(statistics.neurons))
        mask = torch.cat([config.mask(dass_score(part, statistics.neurons, config.power).mT).mT for part in parts])
    return measured(weight, statistics, torch.where(mask, weight, 0))


def dass_score(weight: Tensor, neurons: Tensor, power: float) -> Tensor:
    """|W_ij| * sqrt(mean of h_i^2)^power [n, d_in] in float64, for W [n, d_in] and neurons [n], the mean of h_i^2."""
    return weight.double().abs() * (neurons ** (power / 2))[:, None]
