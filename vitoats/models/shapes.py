"""The shapes of a model's linear layers, and the number of tokens that each of them processes."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vitoats.models.blocks import ModelAdapter
from vitoats.models.hooks import watch_inputs


@dataclass(frozen=True, order=True)
class LayerShape:
    """Everything that the cost of a dense linear layer depends on.

    Attributes:
        d_out: rows of the weight matrix.
        d_in: columns of the weight matrix.
        parts: number of matrices of equal height that the rows stack; 3 for a fused qkv.
        tokens: number of tokens that the layer processes per image.
    """

    d_out: int
    d_in: int
    parts: int
    tokens: int

    @property
    def size(self) -> int:
        """Number of weights."""
        return self.d_out * self.d_in

    def low_rank_parameters(self, rank: int) -> int:
        """Number of elements of U and V, if each part has this rank."""
        return rank * (self.d_out + self.parts * self.d_in)

    def __str__(self) -> str:
        return f"{self.d_out} x {self.d_in}"


@torch.inference_mode()
def layer_shapes(adapter: ModelAdapter, fused_qkv: bool = False) -> dict[str, LayerShape]:
    """The shapes of a dense model's compressible layers, by name.

    Args:
        adapter: the model, which runs once, on one image.
        fused_qkv: treat a fused qkv as one matrix.
    """
    layers = {layer.name: layer for layer in adapter.linears}
    found: dict[str, LayerShape] = {}

    def note(name: str, x: Tensor) -> None:
        d_out, d_in = layers[name].module.weight.shape
        found[name] = LayerShape(d_out, d_in, 1 if fused_qkv else layers[name].parts, x.numel() // d_in)

    with watch_inputs({name: layer.module for name, layer in layers.items()}, note):
        adapter.inputs.call(adapter.model, adapter.inputs.zeros(1).to(adapter.device))
    return found
