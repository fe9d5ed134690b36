"""A compressed layer as named tensors, the form used in checkpoints and in the finished blocks of a run.

L.S.values [nnz], L.S.mask uint8 [d_out, ceil(d_in / 8)]      S (format.bitmask)
L.U.i [d_i, r_i], L.V.i [r_i, d_in]                           for each part i
L.bias [d_out]                                                if the layer has a bias

With int8 weights, values, U and V are int8, and each has the scales of its rows beside it:

L.S.scale [d_out], L.U.i.scale [d_i], L.V.i.scale [r_i]       float32

A dense layer with int8 weights is L.weight int8 [d_out, d_in], L.weight.scale float32 [d_out], L.bias.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vitoats.common.errors import InputError
from vitoats.format import bitmask
from vitoats.format.int8_layers import Int8Linear, Int8SparseLowRankLinear
from vitoats.format.layers import CompressedLinear, SparseLowRankLinear

Layer = CompressedLinear | Int8Linear
ANY = -1  # a dimension that may have any size
SCALE = ".weight.scale"  # ends the name of a tensor that only a dense layer with int8 weights has
BESIDE = re.compile(r".*\.(S\.mask|S\.scale|[UV]\.\d+\.scale|weight\.scale)")  # tensors that hold no parameters


class Kind(NamedTuple):
    """The shape of a tensor, in which ``ANY`` stands for any size, and its dtype; None for any floating-point type."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None = None

    @property
    def floating(self) -> bool:
        return self.dtype is None or self.dtype.is_floating_point

    def fits(self, tensor: Tensor) -> bool:
        """Whether a tensor has this dtype."""
        return tensor.is_floating_point() if self.dtype is None else tensor.dtype == self.dtype


def rounded(layer: Layer, dtype: torch.dtype) -> Layer:
    """The layer with its floating-point weights rounded in place to those of a narrower type, in float32."""
    if _is_int8(layer) or dtype == torch.float32:
        return layer
    for module in layer.modules():  # new parameters: those made in inference mode cannot take other data
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(parameter.detach().to(dtype).float(), requires_grad=False))
    return layer


def pack(name: str, layer: Layer, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The tensors of a layer called ``name``; ``dtype`` is the type of its weights and bias, unless they are int8."""
    if dtype is not None and not _is_int8(layer):
        return {key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in pack(name, layer).items()}
    bias = {f"{name}.bias": layer.bias.data} if layer.bias is not None else {}
    if isinstance(layer, Int8Linear):
        return {f"{name}.weight": layer.weight_int8.data, f"{name}{SCALE}": layer.weight_scale} | bias
    if isinstance(layer, Int8SparseLowRankLinear):
        tensors = _pack_terms(name, layer.S_int8, layer.U_int8, layer.V_int8)
        tensors[f"{name}.S.scale"] = layer.S_scale.data
        for i, (u, v) in enumerate(zip(layer.U_scale, layer.V_scale, strict=True)):
            tensors |= {f"{name}.U.{i}.scale": u.data, f"{name}.V.{i}.scale": v.data}
        return tensors | bias
    return _pack_terms(name, layer.S, layer.U, layer.V) | bias


def _is_int8(layer: Layer) -> bool:
    return isinstance(layer, (Int8Linear, Int8SparseLowRankLinear))


def _pack_terms(name: str, S: Tensor, U: Iterable[Tensor], V: Iterable[Tensor]) -> dict[str, Tensor]:
    values, mask = bitmask.pack(_known(S.detach().cpu()).numpy())
    tensors = {f"{name}.S.values": torch.from_numpy(values).to(S.dtype), f"{name}.S.mask": torch.from_numpy(mask)}
    for i, (u, v) in enumerate(zip(U, V, strict=True)):
        tensors |= {f"{name}.U.{i}": u.data, f"{name}.V.{i}": v.data}
    return tensors


def kinds(name: str, held: Collection[str], parts: Sequence[tuple[int, int]], d_in: int) -> dict[str, Kind]:
    """The tensors that a layer must have, by name.

    Args:
        name: the layer's name.
        held: names of all tensors of the file; they tell whether the layer has a bias, and whether its weights are int8.
        parts: (rows, rank) of each part.
        d_in: number of the layer's inputs.
    """
    d_out = sum(rows for rows, _ in parts)
    bias = {f"{name}.bias": Kind((d_out,))} if f"{name}.bias" in held else {}
    if f"{name}{SCALE}" in held:
        return {
            f"{name}.weight": Kind((d_out, d_in), torch.int8),
            f"{name}{SCALE}": Kind((d_out,), torch.float32),
        } | bias
    int8 = f"{name}.S.scale" in held
    weights = torch.int8 if int8 else None
    found = {f"{name}.S.values": Kind((ANY,), weights), f"{name}.S.mask": Kind((d_out, -(-d_in // 8)), torch.uint8)}
    scales = {f"{name}.S.scale": Kind((d_out,), torch.float32)}
    for i, (rows, rank) in enumerate(parts):
        found |= {f"{name}.U.{i}": Kind((rows, rank), weights), f"{name}.V.{i}": Kind((rank, d_in), weights)}
        scales |= {f"{name}.U.{i}.scale": Kind((rows,), torch.float32), f"{name}.V.{i}.scale": Kind((rank,), torch.float32)}
    return found | (scales if int8 else {}) | bias


def same_shape(found: Sequence[int], expected: Sequence[int]) -> bool:
    """Whether a shape matches the expected one, in which ``ANY`` matches any size."""
    return len(found) == len(expected) and all(e in (ANY, f) for f, e in zip(found, expected, strict=True))


def unpack(name: str, tensors: Mapping[str, Tensor], parts: Sequence[tuple[int, int]], d_in: int) -> Layer:
    """Restores a layer from the tensors of ``pack``; the layer shares no memory with them.

    Args:
        name: the layer's name.
        tensors: tensors by name; those of other layers are ignored.
        parts: (rows, rank) of each part.
        d_in: number of the layer's inputs.

    Raises:
        InputError: tensors are missing or do not belong together, or a scale is not finite.
    """
    for key, kind in kinds(name, tensors.keys(), parts, d_in).items():
        if key not in tensors:
            raise InputError(f"{key} is missing: the file is damaged")
        found = tensors[key]
        if not same_shape(found.shape, kind.shape):
            raise InputError(f"{key} has the shape {list(found.shape)}, not {list(kind.shape)}: the file is damaged")
        if not kind.fits(found):
            raise InputError(f"{key} is of type {found.dtype}: the file is damaged")
        if key.endswith(".scale") and not torch.isfinite(found).all():
            raise InputError(f"{key} is not finite: the file is damaged")
    bias = tensors.get(f"{name}.bias")
    if f"{name}{SCALE}" in tensors:
        return Int8Linear((tensors[f"{name}.weight"].clone(), tensors[f"{name}{SCALE}"].clone()), bias)
    values = tensors[f"{name}.S.values"]
    S = torch.from_numpy(bitmask.unpack(_known(values).numpy(), tensors[f"{name}.S.mask"].numpy(), d_in)).to(values.dtype)
    U, V = ([f"{name}.{letter}.{i}" for i in range(len(parts))] for letter in "UV")
    if f"{name}.S.scale" not in tensors:
        return SparseLowRankLinear(S, [tensors[key].clone() for key in U], [tensors[key].clone() for key in V], bias)

    def rounded(key: str) -> tuple[Tensor, Tensor]:
        return tensors[key].clone(), tensors[f"{key}.scale"].clone()

    return Int8SparseLowRankLinear(
        (S, tensors[f"{name}.S.scale"].clone()), [rounded(key) for key in U], [rounded(key) for key in V], bias
    )


def _known(tensor: Tensor) -> Tensor:
    """A tensor in a type that numpy has: it has no bfloat16."""
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor
