"""What a change of the blocks does to what a model gives: to features of images, or to the prediction of the next token."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from vitoats.common.errors import InputError
from vitoats.evaluation.fidelity import relative_error
from vitoats.models.blocks import ModelAdapter
from vitoats.models.inputs import TextInputs

Effect = Callable[[Tensor], float]  # hidden states behind the last block -> error against those of the dense model


def effect_on(adapter: ModelAdapter, hidden: Tensor) -> Effect:
    """How far hidden states are from the dense model's, as far as its output is concerned.

    Images: the relative error of the features (``fidelity.relative_error``). Text: the mean over tokens of the Kullback-Leibler
    divergence of the next token's distribution from the dense model's, in nats; it needs no labels.

    Args:
        adapter: the model; what lies behind its blocks does not change.
        hidden: the dense model's hidden states [b, *shape] behind the last block.

    Raises:
        InputError: the features of all images are the same.
    """
    inputs, model = adapter.inputs, adapter.model
    if isinstance(inputs, TextInputs):
        return lambda now: divergence(inputs, model, hidden, now)

    def features(hidden: Tensor) -> np.ndarray:
        return adapter.features_of(hidden).float().cpu().numpy()

    reference = features(hidden)
    if not (reference != reference[0]).any():
        raise InputError(
            "budgets cannot be measured on images that all look the same: give `images` other ones, or `allocation='uniform'`"
        )
    return lambda now: relative_error(features(now), reference)


@torch.inference_mode()
def divergence(inputs: TextInputs, model: torch.nn.Module, dense: Tensor, now: Tensor) -> float:
    """Mean over tokens of KL(dense || now), from the hidden states [b, t, width] behind the last block."""
    total = torch.zeros((), dtype=torch.float64, device=now.device)
    for p, q in zip(inputs.logits_of(model, dense), inputs.logits_of(model, now), strict=True):
        log_p, log_q = p.float().log_softmax(dim=-1), q.float().log_softmax(dim=-1)
        total += (log_p.exp() * (log_p - log_q)).sum().double()
    return total.item() / now.shape[:2].numel()
