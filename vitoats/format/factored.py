"""A compressed layer as named tensors, the form used in checkpoints and in the finished blocks of a run.

L.S.values [nnz], L.S.mask uint8 [d_out, ceil(d_in / 8)]      S (format.bitmask)
L.U.i [d_i, r_i], L.V.i [r_i, d_in]                           for each part i
L.bias [d_out]                                                if the layer has a bias
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vitoats.common.errors import InputError
from vitoats.format import bitmask
from vitoats.format.layers import SparseLowRankLinear

ANY = -1  # a dimension that may have any size


def pack(name: str, layer: SparseLowRankLinear) -> dict[str, Tensor]:
    """The tensors of a layer called ``name``."""
    values, mask = bitmask.pack(layer.S.detach().cpu().numpy())
    tensors = {f"{name}.S.values": torch.from_numpy(values), f"{name}.S.mask": torch.from_numpy(mask)}
    for i, (u, v) in enumerate(zip(layer.U, layer.V, strict=True)):
        tensors |= {f"{name}.U.{i}": u.data, f"{name}.V.{i}": v.data}
    return tensors | ({f"{name}.bias": layer.bias.data} if layer.bias is not None else {})


def shapes(name: str, parts: Sequence[tuple[int, int]], d_in: int, bias: bool) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of a layer whose parts have the given (rows, rank); nnz is ``ANY``."""
    d_out = sum(rows for rows, _ in parts)
    found: dict[str, tuple[int, ...]] = {f"{name}.S.values": (ANY,), f"{name}.S.mask": (d_out, -(-d_in // 8))}
    for i, (rows, rank) in enumerate(parts):
        found |= {f"{name}.U.{i}": (rows, rank), f"{name}.V.{i}": (rank, d_in)}
    return found | ({f"{name}.bias": (d_out,)} if bias else {})


def same_shape(found: Sequence[int], expected: Sequence[int]) -> bool:
    """Whether a shape matches the expected one, in which ``ANY`` matches any size."""
    return len(found) == len(expected) and all(e in (ANY, f) for f, e in zip(found, expected, strict=True))


def unpack(name: str, tensors: Mapping[str, Tensor], parts: Sequence[tuple[int, int]], d_in: int) -> SparseLowRankLinear:
    """Restores a layer from the tensors of ``pack``; the layer shares no memory with them.

    Args:
        name: the layer's name.
        tensors: tensors by name; those of other layers are ignored.
        parts: (rows, rank) of each part.
        d_in: number of the layer's inputs.

    Raises:
        InputError: tensors are missing or do not belong together.
    """
    for key, shape in shapes(name, parts, d_in, f"{name}.bias" in tensors).items():
        if key not in tensors:
            raise InputError(f"{key} is missing: the file is damaged")
        found = tensors[key]
        if not same_shape(found.shape, shape):
            raise InputError(f"{key} has the shape {list(found.shape)}, not {list(shape)}: the file is damaged")
        if found.dtype != torch.uint8 if key.endswith(".S.mask") else not found.is_floating_point():
            raise InputError(f"{key} is of type {found.dtype}: the file is damaged")
    S = bitmask.unpack(tensors[f"{name}.S.values"].numpy(), tensors[f"{name}.S.mask"].numpy(), d_in)
    U, V = ([tensors[f"{name}.{letter}.{i}"].clone() for i in range(len(parts))] for letter in "UV")
    return SparseLowRankLinear(torch.from_numpy(S), U, V, tensors.get(f"{name}.bias"))
