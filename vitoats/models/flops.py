"""The multiply-adds of a model, with their definition."""

import math
import warnings
from typing import Any

import torch
from torch import nn

from vitoats.format.layers import compressed_layers
from vitoats.models.hooks import watch_inputs
from vitoats.models.inputs import ModelInputs, TextInputs

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # fvcore scripts a loss when it is imported
    from fvcore.nn import FlopCountAnalysis

FLOPS = "multiply-adds for one image as fvcore counts them, where a kernel skips all zeros of compressed layers"
FLOPS_OF_TEXT = "multiply-adds of linear layers and head for one window of tokens, without the zeros of compressed layers"


def count_flops(model: nn.Module, inputs: ModelInputs) -> int:
    """Counts the multiply-adds for one image, as fvcore does, but without the zeros of S.

    A fused multiply-add counts as one. fvcore counts products (linear layers, convolutions, attention), and five for each
    element of a layer norm; biases, activations and softmax are not counted. A dense linear layer takes d_out * d_in per token.
    A compressed layer takes its kept parameters, nnz(S) + sum of r_i (d_i + d_in), the work of a kernel that skips all
    zeros.

    Of a language model, only the linear layers and the head are counted, for one window of tokens.

    Args:
        model: the model in eval mode, compressed or not.
        inputs: the model's inputs.
    """
    if isinstance(inputs, TextInputs):
        return _linear_flops(model, inputs)
    image = inputs.zeros(1).to(next(model.parameters()).device)
    analysis = FlopCountAnalysis(model, image).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    analysis.tracer_warnings("none").set_op_handle("aten::scaled_dot_product_attention", _attention)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer warns that the image size becomes fixed, and that it is deprecated itself
        total, by_module = analysis.total(), analysis.by_module()
    for name, layer in compressed_layers(model).items():  # fvcore counts S as dense
        zeros = layer.in_features * layer.out_features - layer.nonzeros
        tokens = by_module[name] // (layer.kept_parameters + zeros)
        total -= tokens * zeros
    return int(total)


@torch.inference_mode()
def _linear_flops(model: nn.Module, inputs: TextInputs) -> int:
    """The multiply-adds of the linear layers for a window, from those for a single token."""
    total = 0

    def note(name: str, x: torch.Tensor) -> None:
        nonlocal total
        layer: Any = layers[name]
        kept = layer.kept_parameters if hasattr(layer, "kept_parameters") else layer.in_features * layer.out_features
        total += x.numel() // layer.in_features * kept

    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)} | dict(compressed_layers(model))
    with watch_inputs(layers, note):
        inputs.call(model, inputs.zeros(1)[:, :1].to(next(model.parameters()).device))
    return total * inputs.seq_len


def _attention(inputs, _outputs) -> int:
    """The products q [..., n, d] k^T [..., d, m], and of the result with v [..., m, e]."""
    q, k, v = (value.type().sizes() for value in inputs[:3])
    return math.prod(q[:-1]) * k[-2] * (q[-1] + v[-1])
