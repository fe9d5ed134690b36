"""Finds numbers that are not finite where they arise: comparisons, maxima and argmax let NaN pass for a number."""

from collections.abc import Mapping

import torch
from torch import Tensor

from vitoats.common.errors import InputError, RunError
from vitoats.common.json_files import REMEDY


def is_finite(x: Tensor) -> bool:
    """Whether no floating-point entry is NaN or Inf; unlike ``torch.isfinite``, this makes no copies."""
    return x.numel() == 0 or bool(torch.stack(x.aminmax()).isfinite().all())


def check_weights(name: str, weights: Mapping[str, Tensor]) -> None:
    """Raises InputError if the model ``name`` has a weight that is NaN or Inf."""
    for key, tensor in weights.items():
        if tensor.is_floating_point() and not is_finite(tensor):
            raise InputError(f"the weight {key} of {name} is not finite (NaN or Inf): load another checkpoint")


def finite_outputs(outputs: Tensor, what: str, remedy: str = REMEDY) -> Tensor:
    """Returns a model's outputs [n, ...] for n images, if all are finite.

    Args:
        outputs: the outputs for one batch.
        what: the outputs' name in the error message.
        remedy: what the user can do.

    Raises:
        RunError: an output is NaN or Inf; the message has the number of images.
    """
    broken = int((~torch.isfinite(outputs)).flatten(1).any(dim=1).sum())
    if broken:
        raise RunError(f"{what} are not finite (NaN or Inf) for {broken} of the {len(outputs)} images of a batch: {remedy}")
    return outputs
