"""What a layer solver knows about a layer's input: moments over all calibration tokens.

X [n_tokens, d_in] stacks the input of one linear layer over all tokens of all calibration images.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from vitoats.common import linalg
from vitoats.common.errors import InputError
from vitoats.common.finite import is_finite

# Which statistics of a layer's inputs are collected: their second moments ("diagonal"), also those of an MLP's hidden neurons
# ("neurons"), or H and the mean ("full").
StatisticsLevel = Literal["diagonal", "neurons", "full"]

CONSTANT = 1e-12  # share of an input's mean square below which its variance is round-off of float32 activations


@dataclass(frozen=True)
class Correlation:
    """H = diag(scale) A diag(scale), in float32, whose round-off is far below the damping.

    Attributes:
        scale: [d_in], float64; 1 for inputs that were always zero.
        A: [d_in, d_in].
    """

    scale: Tensor
    A: Tensor

    @cached_property
    def spectrum(self) -> tuple[Tensor, Tensor]:
        """m [d_in], not negative, and Q [d_in, d_in] of A = Q diag(m) Q^T; computed once, on first use."""
        m, Q = linalg.eigh(self.A)
        return m.clamp_(min=0), Q


@dataclass(frozen=True)
class InputStatistics:
    """Moments of one linear layer's input, float64.

    Attributes:
        second_moment: [d_in], mean over tokens of x_j^2: the diagonal of H.
        H: [d_in, d_in], X^T X / n_tokens, uncentred. None if the method needs only the diagonal.
        mean: [d_in], mean over tokens of x_j. None if H is.
        neurons: [n], for a layer whose rows produce the n hidden neurons of an MLP (once, or twice if it packs gate and up):
            mean square of each neuron as the MLP's output layer sees it. None for other layers, or if no method needs it.
        round_off: how far an eigenvalue of H may be off, because H is the difference of larger numbers.
    """

    second_moment: Tensor
    H: Tensor | None = None
    mean: Tensor | None = None
    neurons: Tensor | None = None
    round_off: float = 0.0

    @classmethod
    def of(cls, X: Tensor) -> "InputStatistics":
        """All moments, from inputs X [n_tokens, d_in] that fit in memory."""
        X = X.double()
        H = X.T @ X / len(X)
        return cls(H.diagonal().clone(), H, X.mean(dim=0))

    @property
    def full(self) -> Tensor:
        """H [d_in, d_in], for the methods that are registered with needs="full".

        Raises:
            InputError: only the diagonal was collected.
        """
        if self.H is None:
            raise InputError('this method needs the full second moment: register it with needs="full"')
        return self.H

    @cached_property
    def correlation(self) -> "Correlation":
        """H scaled to unit diagonal; computed once, for all matrices that share this input."""
        scale = self.full.diagonal().sqrt()
        scale = torch.where(scale == 0, 1, scale)  # an input that was always zero
        return Correlation(scale, (self.full / scale / scale[:, None]).float())

    def diagonal(self) -> "InputStatistics":
        """The moments that a method sees which does without H."""
        return replace(self, H=None, mean=None)

    def centred(self) -> "InputStatistics":
        """The moments about the mean, which give the output error that remains once the bias is refitted.

        An input whose variance is below round-off counts as constant: its moments are 0.

        Raises:
            InputError: only the diagonal was collected.
        """
        mean = self._collected_mean()
        H = self.full - torch.outer(mean, mean)
        constant = H.diagonal() <= CONSTANT * self.full.diagonal()
        H[constant] = H[:, constant] = 0
        round_off = torch.finfo(torch.float64).eps * self.full.trace().item()
        return InputStatistics(H.diagonal().clone(), H, torch.zeros_like(mean), round_off=round_off)

    def ridge(self, share: float) -> float:
        """What damping adds to the diagonal of H: a share of its mean, but at least the round-off.

        Raises:
            InputError: only the diagonal was collected.
        """
        return max(share * self.full.diagonal().mean().item(), self.round_off)

    def mean_output(self, weight: Tensor) -> Tensor:
        """Mean output over tokens of a weight [d_out, d_in], float64 [d_out].

        Raises:
            InputError: only the diagonal was collected.
        """
        return weight.double() @ self._collected_mean()

    def _collected_mean(self) -> Tensor:
        if self.mean is None:
            raise InputError('a bias refit needs the mean of the inputs: collect "full" statistics')
        return self.mean

    def to(self, device: torch.device) -> "InputStatistics":
        """The same moments on another device."""
        H, mean, neurons = (None if x is None else x.to(device) for x in (self.H, self.mean, self.neurons))
        return InputStatistics(self.second_moment.to(device), H, mean, neurons, self.round_off)


def check_finite(weight: Tensor, statistics: InputStatistics) -> None:
    """Refuses non-finite numbers, which no method can handle.

    Raises:
        InputError: a weight or a moment is NaN or Inf.
    """
    if not is_finite(weight):
        raise InputError("a weight is not finite (NaN or Inf): the weights are broken, load another checkpoint")
    moments = (statistics.second_moment, statistics.H, statistics.mean, statistics.neurons)
    if not all(is_finite(x) for x in moments if x is not None):
        raise InputError("an activation is not finite (NaN or Inf): check the weights and the calibration images")
