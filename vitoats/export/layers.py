"""The exported form of a compressed layer: a node with S as values and bit mask; U and V are its inputs or separate MatMuls."""

from typing import Literal

import torch
from torch import Tensor, nn

from vitoats.common.errors import InputError
from vitoats.format import bitmask
from vitoats.format.layers import CompressedLinear
from vitoats.format.operator import DOMAIN, DOMAIN_VERSION, INPUTS, NAME

LowRankForm = Literal["none", "inputs", "nodes"]


class ExportedSparseLowRankLinear(nn.Module):
    """Traces to SparseMatMul(x, values, mask, bias[, U, V]), possibly with MatMuls; for torch.onnx.export only."""

    def __init__(self, layer: CompressedLinear, low_rank: LowRankForm, float16: bool = False):
        """Converts a layer.

        Args:
            layer: the compressed layer.
            low_rank: "inputs" for U and V as inputs of the node (zeros if this layer has rank 0 but others do not), "nodes" for
                x V^T, its parts times U_i^T, and the sum as standard nodes, "none" if no layer has a low-rank term.
            float16: store S, and U and V if they are inputs, as float16; the arithmetic stays float32.

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
        self.low_rank = low_rank
        if low_rank == "inputs":
            self.U, self.V = (_stored(term, float16) for term in _stacked(list(layer.U), list(layer.V)))
        elif low_rank == "nodes" and layer.rank:
            self.V_stacked = _stored(torch.cat([v.data for v in layer.V]).T)  # [d_in, sum of r_i]
            self.U_blocks = nn.ParameterList(_stored(u.data.T) for u in layer.U)  # [r_i, d_i] each
        else:
            self.low_rank = "none"

    def forward(self, x: Tensor) -> Tensor:
        y = self._node(x)
        if self.low_rank != "nodes":
            return y
        z = (x @ self.V_stacked).split([len(u) for u in self.U_blocks], dim=-1)
        return y + torch.cat([part @ u for part, u in zip(z, self.U_blocks, strict=True)], dim=-1)

    @property
    def constants(self) -> dict[str, Tensor]:
        """The inputs of the node except x, by name, in order."""
        names = INPUTS[1:] if self.low_rank == "inputs" else INPUTS[1:4]
        return {name: getattr(self, name) for name in names}

    def _node(self, x: Tensor) -> Tensor:
        return torch.onnx.ops.symbolic(
            f"{DOMAIN}::{NAME}",
            (x, *self.constants.values()),
            {"in_features": self.in_features},
            dtype=x.dtype,
            shape=(*x.shape[:-1], self.out_features),
            version=DOMAIN_VERSION,
        )


def _stacked(U: list[Tensor], V: list[Tensor]) -> tuple[Tensor, Tensor]:
    """U_i [d_i, r_i] and V_i [r_i, d_in] of all parts as U [parts, d, r] and V [parts, r, d_in], r at least 1.

    Smaller ranks are padded with zeros. Parts of different heights are merged into one, with the U_i as a block diagonal.
    """
    if len({len(u) for u in U}) > 1:
        U, V = [torch.block_diag(*U)], [torch.cat(V)]
    rank = max(1, *(len(v) for v in V))
    return (
        torch.stack([nn.functional.pad(u.data, (0, rank - u.shape[1])) for u in U]),
        torch.stack([nn.functional.pad(v.data, (0, 0, 0, rank - len(v))) for v in V]),
    )


def _stored(weights: Tensor, float16: bool = False) -> nn.Parameter:
    stored = weights.to(torch.float16) if float16 else weights
    if not torch.isfinite(stored).all():
        raise InputError("a weight is too large for float16: export without `float16`")
    return nn.Parameter(stored.contiguous(), requires_grad=False)
