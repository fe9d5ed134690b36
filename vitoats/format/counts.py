"""How large a model is, in numbers that are defined before they are printed: parameters, non-zeros, bytes and FLOPs."""

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitoats.format.layers import compressed_layers

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # fvcore scripts a loss when it is imported
    from fvcore.nn import FlopCountAnalysis

DEFINITIONS = {
    "parameters": "numbers the model keeps: of a compressed layer nnz(S), U, V and bias, of all others every entry",
    "non-zeros": "those of them that are not zero",
    "bytes": "of all tensors in model.safetensors, bit masks included, its header left out",
}
FLOPS = "multiply-adds for one image as fvcore counts them, where a kernel skips all zeros of compressed layers"


COUNTED = ("parameters", "nonzeros", "bytes")  # the fields of Counts, in the order of DEFINITIONS


@dataclass(frozen=True)
class Counts:
    """A model's size, as ``DEFINITIONS`` says."""

    parameters: int
    nonzeros: int
    bytes: int


def count(tensors: dict[str, Tensor], not_parameters: set[str]) -> Counts:
    """Counts a model's tensors as a file holds them.

    Args:
        tensors: by name; S of a compressed layer L as L.S.values and L.S.mask.
        not_parameters: names of buffers (a batch norm's running mean, say), which are bytes only, as bit masks are.
    """
    kept = [t for name, t in tensors.items() if name not in not_parameters and not name.endswith(".S.mask")]
    return Counts(
        parameters=sum(t.numel() for t in kept),
        nonzeros=sum(int(torch.count_nonzero(t)) for t in kept),
        bytes=sum(t.nbytes for t in tensors.values()),
    )


def count_flops(model: nn.Module, img_size: int) -> int:
    """Multiply-adds for one image, as fvcore counts them, with zeros of S left out.

    One fused multiply-add is one. fvcore counts products (linear layers, convolutions, attention) and five for each element
    of a layer norm; biases, activations and softmax count nothing. A dense linear layer takes d_out * d_in for each token, a
    ``SparseLowRankLinear`` its kept parameters, nnz(S) + sum of r_i (d_i + d_in): what a kernel that skips all zeros would do.

    Args:
        model: in eval mode, compressed or not.
        img_size: in pixels.
    """
    image = torch.zeros(1, 3, img_size, img_size, device=next(model.parameters()).device)
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
