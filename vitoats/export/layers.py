"""The compressed layer in exported form: S as values and bit mask, and plain MatMul nodes beside it."""

import torch
from torch import Tensor, nn

from vitoats import bitmask
from vitoats.errors import InputError
from vitoats.export.sparse_matmul import DOMAIN, DOMAIN_VERSION, NAME
from vitoats.layers import SparseLowRankLinear


class ExportedSparseLowRankLinear(nn.Module):
    """Traces to SparseMatMul(x, values, mask, bias, the low-rank term); for torch.onnx.export only.

    The low-rank term is one MatMul with all V stacked, a Split, one MatMul for each U, and a Concat. Row blocks of rank 0 add
    a block of zeros, which cannot happen beside others of a rank above 0: they all have one shape.
    """

    def __init__(self, layer: SparseLowRankLinear, inputs: int, float16: bool = False):
        """Takes a layer.

        Args:
            layer: the layer.
            inputs: of SparseMatMul, one number for all layers of a file: 4 with the bias, 5 with the low-rank term too.
            float16: whether S, U and V are stored so; the arithmetic stays float32.

        Raises:
            InputError: a weight is too large for float16.
        """
        super().__init__()
        values, mask = bitmask.pack(layer.S.detach().cpu().numpy())
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.ranks = [rank for _, rank in layer.row_blocks]
        self.values = _stored(torch.from_numpy(values), float16)
        self.mask = nn.Parameter(torch.from_numpy(mask), requires_grad=False)
        if layer.rank:
            self.V = _stored(torch.cat([v.data for v in layer.V]).T, float16)  # [d_in, sum r_i]
            self.U = nn.ParameterList(_stored(u.data.T, float16) for u in layer.U)  # each [r_i, d_i]
        self.inputs = inputs
        bias = torch.zeros(self.out_features) if layer.bias is None else layer.bias.detach()
        self.bias = nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:-1], self.out_features)
        terms = (self.bias, self._low_rank(x, shape))[: self.inputs - 3]
        return torch.onnx.ops.symbolic(
            f"{DOMAIN}::{NAME}",
            (x, self.values, self.mask, *terms),
            {"in_features": self.in_features},
            dtype=x.dtype,
            shape=shape,
            version=DOMAIN_VERSION,
        )

    def _low_rank(self, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        if not sum(self.ranks):  # beside layers that have one
            return torch.zeros(1, dtype=x.dtype).expand(shape)
        inner = x @ self.V.to(x.dtype)
        parts = torch.split(inner, self.ranks, dim=-1) if len(self.ranks) > 1 else [inner]
        products = [part @ u.to(x.dtype) for part, u in zip(parts, self.U, strict=True)]
        return torch.cat(products, dim=-1) if len(products) > 1 else products[0]


def _stored(weights: Tensor, float16: bool) -> nn.Parameter:
    stored = weights.to(torch.float16) if float16 else weights
    if not torch.isfinite(stored).all():
        raise InputError("a weight is too large for float16: export without --float16")
    return nn.Parameter(stored.contiguous(), requires_grad=False)
