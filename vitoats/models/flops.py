"""How much a model computes, in numbers that are defined before they are printed."""

import math
import warnings

import torch
from torch import nn

from vitoats.format.layers import compressed_layers
from vitoats.models.inputs import ImageInputs

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # fvcore scripts a loss when it is imported
    from fvcore.nn import FlopCountAnalysis

FLOPS = "multiply-adds for one image as fvcore counts them, where a kernel skips all zeros of compressed layers"


def count_flops(model: nn.Module, inputs: ImageInputs) -> int:
    """Multiply-adds for one image, as fvcore counts them, with zeros of S left out.

    One fused multiply-add is one. fvcore counts products (linear layers, convolutions, attention) and five for each element
    of a layer norm; biases, activations and softmax count nothing. A dense linear layer takes d_out * d_in for each token, a
    ``SparseLowRankLinear`` its kept parameters, nnz(S) + sum of r_i (d_i + d_in): what a kernel that skips all zeros would do.

    Args:
        model: in eval mode, compressed or not.
        inputs: what it takes.
    """
    image = inputs.zeros(1).to(next(model.parameters()).device)
    analysis = FlopCountAnalysis(model, image).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    analysis.tracer_warnings("none").set_op_handle("aten::scaled_dot_product_attention", _attention)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer notes that the image size is fixed, and that it is deprecated
        total, by_module = analysis.total(), analysis.by_module()
    for name, layer in compressed_layers(model).items():  # traced with S dense
        zeros = layer.S.numel() - layer.nonzeros
        tokens = by_module[name] // (layer.kept_parameters + zeros)
        total -= tokens * zeros
    return int(total)


def _attention(inputs, _outputs) -> int:
    """q [..., n, d] k^T [..., d, m] and its product with v [..., m, e]."""
    q, k, v = (value.type().sizes() for value in inputs[:3])
    return math.prod(q[:-1]) * k[-2] * (q[-1] + v[-1])
