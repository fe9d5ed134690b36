"""What a layer solver is told about a layer's input: moments over all calibration tokens.

X [n_tokens, d_in] stacks the input of one linear layer over all tokens of all calibration images.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vitoats.errors import InputError

Needs = Literal["diagonal", "neurons", "full"]  # neurons: the diagonal, and InputStatistics.neurons


@dataclass(frozen=True)
class InputStatistics:
    """Moments of one linear layer's input, float64.

    Attributes:
        second_moment: [d_in], mean over tokens of x_j^2: the diagonal of H.
        H: [d_in, d_in], X^T X / n_tokens, uncentred. None where the method needs the diagonal alone.
        mean: [d_in], mean over tokens of x_j. None where H is.
        neurons: [n], for a layer whose rows make the n hidden neurons of an MLP (once, or twice where it is gated): mean
            square of each neuron as the MLP's output layer sees it. None for other layers, and where no method asks.
    """

    second_moment: Tensor
    H: Tensor | None = None
    mean: Tensor | None = None
    neurons: Tensor | None = None

    @classmethod
    def of(cls, X: Tensor) -> "InputStatistics":
        """All moments of inputs X [n_tokens, d_in] that fit in memory."""
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

    def to(self, device: torch.device) -> "InputStatistics":
        """The same on another device."""
        H, mean, neurons = (None if x is None else x.to(device) for x in (self.H, self.mean, self.neurons))
        return InputStatistics(self.second_moment.to(device), H, mean, neurons)


def check_finite(weight: Tensor, statistics: InputStatistics) -> None:
    """Refuses numbers that no method can work with.

    Raises:
        InputError: a weight or a moment is NaN or Inf.
    """
    if not torch.isfinite(weight).all():
        raise InputError("a weight is not finite (NaN or Inf): the weights are broken, load another checkpoint")
    moments = (statistics.second_moment, statistics.H, statistics.mean, statistics.neurons)
    if not all(torch.isfinite(x).all() for x in moments if x is not None):
        raise InputError("an activation is not finite (NaN or Inf): check the weights and the calibration images")
