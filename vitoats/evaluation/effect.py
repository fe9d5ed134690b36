"""What compressing a single layer does to what a model gives: the features of images here, predictions in ``second_order``."""

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from vitoats.common.errors import InputError
from vitoats.evaluation.fidelity import relative_error
from vitoats.models.blocks import Block, LinearLayer, ModelAdapter


class LayerEffects(Protocol):
    """The effects of the layers of one block."""

    def error(self, layer: LinearLayer, weight: Tensor, bias: Tensor | None, /) -> float:
        """The error of what the model gives, if a layer has another weight [d_out, d_in] and bias [d_out]."""

    def multiply_adds(self, layer: LinearLayer, /) -> float:
        """Multiply-adds that ``error`` takes, about."""


class Effects(Protocol):
    """The effects of all layers of a model."""

    def before(self, index: int, hidden: Tensor, /) -> LayerEffects:
        """The effects of the layers of a block, by its index and the hidden states [n, *shape_before] before it."""


class FeatureEffects:
    """The relative error of the features (``fidelity.relative_error``), measured: the changed model runs."""

    def __init__(self, adapter: ModelAdapter, hidden: Tensor):
        """Computes the dense model's features.

        Args:
            adapter: the dense model, of images.
            hidden: the hidden states [n, *shape_before] of some images before the first block.

        Raises:
            InputError: the features of all images are the same.
        """
        self.adapter = adapter
        self.reference = _features(adapter, adapter.blocks, hidden)
        if not (self.reference != self.reference[0]).any():
            raise InputError(
                "budgets cannot be measured on images that all look the same: give `images` other ones, "
                "or `allocation='uniform'`"
            )

    def before(self, index: int, hidden: Tensor) -> LayerEffects:
        """The effects of the layers of a block."""
        return _InBlock(self, self.adapter.blocks[index:], hidden.clone())


class _InBlock:
    def __init__(self, effects: FeatureEffects, blocks: list[Block], hidden: Tensor):
        self.effects, self.blocks, self.hidden = effects, blocks, hidden
        self._passes = hidden.numel() * sum(x.module.out_features for block in blocks for x in block.linears)

    def error(self, layer: LinearLayer, weight: Tensor, bias: Tensor | None) -> float:
        """The features' error; the layer is restored afterwards."""
        module = layer.module
        dense = [parameter.data for parameter in module.parameters()]
        try:
            module.weight.data = weight
            if bias is not None:
                module.bias.data = bias
            return relative_error(_features(self.effects.adapter, self.blocks, self.hidden), self.effects.reference)
        finally:
            for parameter, data in zip(module.parameters(), dense, strict=True):
                parameter.data = data

    def multiply_adds(self, _layer: LinearLayer) -> float:
        """Those of the blocks behind the layer, and of its own."""
        return float(self._passes)


@torch.inference_mode()
def _features(adapter: ModelAdapter, blocks: list[Block], hidden: Tensor) -> np.ndarray:
    """The features behind the last blocks, from the hidden states before them."""
    for block in blocks:
        hidden = block.run(hidden)
    return adapter.features_of(hidden).float().cpu().numpy()
