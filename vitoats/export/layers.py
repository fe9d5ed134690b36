"""The compressed layer in exported form: one node with S as values and bit mask, and U and V beside it."""

import torch
from torch import Tensor, nn

from vitoats import bitmask
from vitoats.errors import InputError
from vitoats.export.sparse_matmul import DOMAIN, DOMAIN_VERSION, NAME
from vitoats.layers import SparseLowRankLinear


class ExportedSparseLowRankLinear(nn.Module):
    """Traces to SparseMatMul(x, values, mask, bias, U, V); for torch.onnx.export only."""

    def __init__(self, layer: SparseLowRankLinear, low_rank: bool, float16: bool = False):
        """Takes a layer.

        Args:
            layer: the layer.
            low_rank: whether the nodes of this file have U and V; a layer of rank 0 beside others has zeros there.
            float16: whether S, U and V are stored so; the arithmetic stays float32.

        Raises:
            InputError: a weight is too large for float16.
        """
        super().__init__()
        values, mask = bitmask.pack(layer.S.detach().cpu().numpy())
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.values = _stored(torch.from_numpy(values), float16)
        self.mask = nn.Parameter(torch.from_numpy(mask), requires_grad=False)
        bias = torch.zeros(self.out_features) if layer.bias is None else layer.bias.detach()
        self.bias = nn.Parameter(bias, requires_grad=False)
        if low_rank:
            self.U, self.V = (_stored(term, float16) for term in _stacked(list(layer.U), list(layer.V)))
        self.low_rank = low_rank

    def forward(self, x: Tensor) -> Tensor:
        low_rank = (self.U, self.V) if self.low_rank else ()
        return torch.onnx.ops.symbolic(
            f"{DOMAIN}::{NAME}",
            (x, self.values, self.mask, self.bias, *low_rank),
            {"in_features": self.in_features},
            dtype=x.dtype,
            shape=(*x.shape[:-1], self.out_features),
            version=DOMAIN_VERSION,
        )


def _stacked(U: list[Tensor], V: list[Tensor]) -> tuple[Tensor, Tensor]:
    """U_i [d_i, r_i] and V_i [r_i, d_in] of all row blocks as U [blocks, d, r] and V [blocks, r, d_in], r at least 1.

    Smaller ranks are filled up with zeros. Row blocks of different heights become one, with zeros beside each U_i.
    """
    if len({len(u) for u in U}) > 1:
        U, V = [torch.block_diag(*U)], [torch.cat(V)]
    rank = max(1, *(len(v) for v in V))
    return (
        torch.stack([nn.functional.pad(u.data, (0, rank - u.shape[1])) for u in U]),
        torch.stack([nn.functional.pad(v.data, (0, 0, 0, rank - len(v))) for v in V]),
    )


def _stored(weights: Tensor, float16: bool) -> nn.Parameter:
    stored = weights.to(torch.float16) if float16 else weights
    if not torch.isfinite(stored).all():
        raise InputError("a weight is too large for float16: export without --float16")
    return nn.Parameter(stored.contiguous(), requires_grad=False)
