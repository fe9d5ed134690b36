"""Layers with int8 weights, whose forward computes what the native operators do: tokens are quantized on the way.

    y = x^ S^T + [z^_1 U_1^T, z^_2 U_2^T, ...] + b,    z_i = x^ V_i^T

where x^ is x, and z^_i is z_i, with each token quantized (``vitoats.format.int8``). The sums are in floating point here, and
exact integers there, so outputs differ by round-off alone, or by one level of z^ where a tie is rounded the other way.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitoats.common.errors import InputError
from vitoats.common.finite import is_finite
from vitoats.format.int8 import Rounded, dequantized, fake_quantized, round_rows, rounded_factors
from vitoats.format.layers import CompressedLinear, SparseLowRankLinear, linear, parameters


class Int8SparseLowRankLinear(CompressedLinear):
    """A compressed layer with int8 weights.

    Attributes:
        S_int8, S_scale: int8 [d_out, d_in], zeros included, and [d_out].
        U_int8, U_scale: one int8 [d_i, r_i] and [d_i] per part.
        V_int8, V_scale: one int8 [r_i, d_in] and [r_i] per part.
        S, U, V: what they stand for, computed on each access.
        bias: [d_out] or None.
    """

    def __init__(self, S: Rounded, U: list[Rounded], V: list[Rounded], bias: Tensor | None = None):
        super().__init__()
        self.out_features, self.in_features = S[0].shape
        assert sum(len(u) for u, _ in U) == self.out_features
        assert all(u.shape[1] == len(v) and v.shape[1] == self.in_features for (u, _), (v, _) in zip(U, V, strict=True))
        self.S_int8, self.S_scale = (nn.Parameter(tensor, requires_grad=False) for tensor in S)
        self.U_int8, self.U_scale = (parameters(tensors) for tensors in zip(*U, strict=True))
        self.V_int8, self.V_scale = (parameters(tensors) for tensors in zip(*V, strict=True))
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        x = fake_quantized(x)
        y = F.linear(x, self.S, self.bias)
        if self.rank:
            y = y + torch.cat(
                [F.linear(fake_quantized(F.linear(x, v)), u) for u, v in zip(self.U, self.V, strict=True)], dim=-1
            )
        return y

    @property
    def S(self) -> Tensor:  # type: ignore[override]  # noqa: N802
        return dequantized(self.S_int8, self.S_scale)

    @property
    def U(self) -> list[Tensor]:  # type: ignore[override]  # noqa: N802
        return [dequantized(u, scale) for u, scale in zip(self.U_int8, self.U_scale, strict=True)]

    @property
    def V(self) -> list[Tensor]:  # type: ignore[override]  # noqa: N802
        return [dequantized(v, scale) for v, scale in zip(self.V_int8, self.V_scale, strict=True)]

    @property
    def parts(self) -> list[tuple[int, int]]:
        return [(u.shape[0], u.shape[1]) for u in self.U_int8]

    @property
    def nonzeros(self) -> int:
        return int(torch.count_nonzero(self.S_int8))


class Int8Linear(nn.Module):
    """y = x^ W^T + b: a dense layer with int8 weights.

    Attributes:
        weight_int8: int8 [d_out, d_in].
        weight_scale: [d_out].
        weight: what they stand for, computed on each access.
        bias: [d_out] or None.
    """

    weight_scale: Tensor

    def __init__(self, weight: Rounded, bias: Tensor | None = None):
        super().__init__()
        self.out_features, self.in_features = weight[0].shape
        self.weight_int8 = nn.Parameter(weight[0], requires_grad=False)
        self.register_buffer("weight_scale", weight[1])
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(fake_quantized(x), self.weight, self.bias)

    @property
    def weight(self) -> Tensor:
        return dequantized(self.weight_int8, self.weight_scale)

    @property
    def nonzeros(self) -> int:
        """Number of weights that are not zero."""
        return int(torch.count_nonzero(self.weight_int8))

    @property
    def kept_parameters(self) -> int:
        """Number of weights."""
        return self.weight_int8.numel()

    def folded(self) -> nn.Linear:
        """A dense layer with the same weights."""
        return linear(self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def int8_linears(model: nn.Module) -> dict[str, Int8Linear]:
    """The dense layers with int8 weights of a model by name, in order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, Int8Linear)}


def to_int8(layer: SparseLowRankLinear | nn.Linear) -> Int8SparseLowRankLinear | Int8Linear:
    """Rounds a finished layer's weights, without any knowledge of its inputs.

    U and V are balanced and rounded, S takes up their errors where it is not zero, and is rounded, too.

    Raises:
        InputError: a weight is not finite.
    """
    if not all(map(is_finite, layer.parameters())):
        raise InputError("a weight is not finite (NaN or Inf): the weights are broken, load another checkpoint")
    if isinstance(layer, nn.Linear):
        return Int8Linear(round_rows(layer.weight.detach()), layer.bias)
    U, V = zip(*(rounded_factors(u, v) for u, v in zip(layer.U, layer.V, strict=True)), strict=True)
    low_rank = torch.cat([dequantized(*u) @ dequantized(*v) for u, v in zip(U, V, strict=True)])
    S = torch.where(layer.S == 0, 0, layer.weight - low_rank)
    return Int8SparseLowRankLinear(round_rows(S), list(U), list(V), layer.bias)
