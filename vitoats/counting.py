"""What a model costs: parameters, bytes of weights and FLOPs, each defined here.

* parameters: elements of all parameters, zeros included.
* bytes: of these as they lie in memory.
* FLOPs: of one image through the whole model, by fvcore. One multiply-add counts as one, the paper habit for vision models;
  linear layers, convolutions, both products of attention and norms count, sums, GELU and softmax do not. A weight that is zero
  counts like any other: this measures dense arithmetic.
"""

from dataclasses import dataclass
from typing import Any

import torch
from fvcore.nn import FlopCountAnalysis
from fvcore.nn.jit_handles import get_shape
from torch import nn


@dataclass(frozen=True)
class Size:
    """Parameters, bytes and FLOPs of a model."""

    parameters: int
    bytes: int
    flops: int


def measure(model: nn.Module, img_size: int) -> Size:
    """Counts a model on one image [1, 3, img_size, img_size]."""
    parameters = list(model.parameters())
    image = torch.zeros(1, 3, img_size, img_size, device=parameters[0].device)
    counted = FlopCountAnalysis(model, image).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    counted.set_op_handle("aten::scaled_dot_product_attention", _attention)
    return Size(sum(p.numel() for p in parameters), sum(p.numel() * p.element_size() for p in parameters), int(counted.total()))


def _attention(inputs: list[Any], _outputs: list[Any]) -> int:
    """Q K^T and the product with V, for q [..., n, d], k [..., m, d] and v [..., m, e]."""
    q, k, v = (get_shape(x) for x in inputs[:3])
    rows = 1
    for size in q[:-1]:
        rows *= size
    return rows * k[-2] * (q[-1] + v[-1])
