"""The compressed layer that replaces an ``nn.Linear``."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitoats.format.decomposition import Decomposition


class CompressedLinear(nn.Module):
    """y = x S^T + [x V_1^T U_1^T, x V_2^T U_2^T, ...] + b: a sparse matrix and one low-rank term for each part.

    A plain layer has one part; a fused qkv has three, each decomposed separately.

    Attributes:
        S: [d_out, d_in], zeros included.
        U: one [d_i, r_i] per part; the d_i add up to d_out, and r_i may be 0.
        V: one [r_i, d_in] per part.
        bias: [d_out] or None.
    """

    in_features: int
    out_features: int
    S: Tensor
    U: Iterable[Tensor]
    V: Iterable[Tensor]
    bias: Tensor | None

    @property
    def parts(self) -> list[tuple[int, int]]:
        """(rows, rank) of each part."""
        return [(u.shape[0], u.shape[1]) for u in self.U]

    @property
    def rank(self) -> int:
        """Sum of the ranks of all parts."""
        return sum(rank for _, rank in self.parts)

    @property
    def nonzeros(self) -> int:
        """Number of non-zeros of S."""
        return int(torch.count_nonzero(self.S))

    @property
    def kept_parameters(self) -> int:
        """nnz(S) + sum of r_i (d_i + d_in): the parameter count of OATS, without indices, scales and bias."""
        return self.nonzeros + sum(rank * (rows + self.in_features) for rows, rank in self.parts)

    @property
    def weight(self) -> Tensor:
        """S + U V, the dense matrix [d_out, d_in] that this layer represents."""
        return on_support(self.S) + torch.cat([u @ v for u, v in zip(self.U, self.V, strict=True)])

    def folded(self) -> nn.Linear:
        """A dense layer with the same weights."""
        return linear(self.weight, self.bias)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, bias={self.bias is not None}"
        )


class SparseLowRankLinear(CompressedLinear):
    """A compressed layer in floating point.

    S is stored densely, so that it works on every device and with torch.autograd. Its gradient is zero where S is zero, so
    training changes its values and keeps its zeros. Checkpoints and ONNX files store its values and bit mask.
    """

    def __init__(self, S: Tensor, U: list[Tensor], V: list[Tensor], bias: Tensor | None = None):
        super().__init__()
        self.out_features, self.in_features = S.shape
        assert sum(u.shape[0] for u in U) == self.out_features
        assert all(u.shape[1] == v.shape[0] and v.shape[1] == self.in_features for u, v in zip(U, V, strict=True))
        self.S = nn.Parameter(S, requires_grad=False)
        self.U = parameters(U)
        self.V = parameters(V)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)

    @classmethod
    def from_decompositions(cls, parts: list[Decomposition], bias: Tensor | None) -> "SparseLowRankLinear":
        """Builds a layer from the decompositions of its parts, in order of their rows."""
        return cls(torch.cat([p.S for p in parts]), [p.U for p in parts], [p.V for p in parts], bias)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.numel() // self.in_features
        if tokens * (self.in_features + self.out_features) > self.in_features * self.out_features:
            return F.linear(x, self.weight, self.bias)  # with this many tokens cheaper than applying U and V separately
        y = F.linear(x, on_support(self.S), self.bias)
        if self.rank:
            y = y + torch.cat([F.linear(F.linear(x, v), u) for u, v in zip(self.U, self.V, strict=True)], dim=-1)
        return y


def on_support(S: Tensor) -> Tensor:
    """S; where it is trained, its gradient is zero for entries that are zero."""
    return S * (S != 0) if S.requires_grad and torch.is_grad_enabled() else S


def parameters(tensors: Iterable[Tensor]) -> nn.ParameterList:
    """Tensors as parameters that take no gradient."""
    return nn.ParameterList(nn.Parameter(tensor.contiguous(), requires_grad=False) for tensor in tensors)


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A dense layer with copies of a weight [d_out, d_in] and a bias [d_out]."""
    made = nn.Linear(weight.shape[1], len(weight), bias=bias is not None, dtype=weight.dtype, device=weight.device)
    made.weight.data.copy_(weight)
    if bias is not None:
        made.bias.data.copy_(bias)
    return made


def compressed_layers(model: nn.Module) -> dict[str, CompressedLinear]:
    """The compressed layers of a model by name, in order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, CompressedLinear)}


def parameter_count(model: nn.Module) -> int:
    """A model's kept parameters: nnz(S) + r (d_in + d_out) + bias for compressed layers, all elements of other parameters."""
    count = sum(p.numel() for p in model.parameters())
    for layer in compressed_layers(model).values():
        stored = sum(p.numel() for p in layer.parameters())
        count += layer.kept_parameters + (0 if layer.bias is None else layer.bias.numel()) - stored
    return count


def compressed_counts(model: nn.Module) -> dict[str, int]:
    """Total ``nnz``, non-zeros of S, and ``rank_params``, elements of U and V; empty if the model has no compressed layers."""
    layers = compressed_layers(model).values()
    nonzeros = sum(layer.nonzeros for layer in layers)
    return {"nnz": nonzeros, "rank_params": sum(layer.kept_parameters for layer in layers) - nonzeros} if layers else {}


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Replaces the module with the dotted name ``name`` by ``new``."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)
