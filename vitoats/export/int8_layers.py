"""The exported form of layers with int8 weights, and the rounding of a whole model."""

import copy

import torch
from torch import Tensor, nn

from vitoats.common.errors import InputError
from vitoats.format import tiles
from vitoats.format.int8_layers import Int8Linear, Int8SparseLowRankLinear, to_int8
from vitoats.format.layers import SparseLowRankLinear, compressed_layers, replace_module
from vitoats.format.operator import DENSE_INT8, DOMAIN, DOMAIN_VERSION, INT8_OPERATORS, SPARSE_INT8
from vitoats.loading.loaded import LoadedModel
from vitoats.models.adapter import adapt

MOST_INPUTS = 65_536
Int8Layer = Int8SparseLowRankLinear | Int8Linear


class ExportedInt8Layer(nn.Module):
    """Traces to SparseMatMulInt8 or MatMulInt8 of x and this module's parameters; for torch.onnx.export only.

    Attributes:
        operator: the operator.
    """

    def __init__(self, layer: Int8Layer):
        """Converts a layer.

        Raises:
            InputError: the layer has too many inputs for exact sums of int32.
        """
        super().__init__()
        if layer.in_features > MOST_INPUTS:
            raise InputError(f"a layer has {layer.in_features} inputs, and int8 weights allow {MOST_INPUTS}: export in float32")
        self.in_features, self.out_features = layer.in_features, layer.out_features
        bias = torch.zeros(layer.out_features) if layer.bias is None else layer.bias.detach()
        if isinstance(layer, Int8Linear):
            constants = {"weight": _tiled(layer.weight_int8), "scale": layer.weight_scale}
        elif layer.rank == 0 and not _mask_saves(layer):
            constants = {"weight": _tiled(layer.S_int8), "scale": layer.S_scale}
        else:
            constants = _sparse(layer) | _stacked(
                list(layer.U_int8), list(layer.U_scale), list(layer.V_int8), list(layer.V_scale)
            )
        self.operator = INT8_OPERATORS[DENSE_INT8 if "weight" in constants else SPARSE_INT8]
        for name, tensor in (constants | {"bias": bias}).items():
            setattr(self, name, nn.Parameter(tensor.detach().contiguous(), requires_grad=False))

    def forward(self, x: Tensor) -> Tensor:
        return torch.onnx.ops.symbolic(
            f"{DOMAIN}::{self.operator.name}",
            (x, *self.constants.values()),
            {"in_features": self.in_features},
            dtype=x.dtype,
            shape=(*x.shape[:-1], self.out_features),
            version=DOMAIN_VERSION,
        )

    @property
    def constants(self) -> dict[str, Tensor]:
        """The inputs of the node except x, by name, in order."""
        return {name: getattr(self, name) for name in self.operator.inputs[1:]}


def int8_layers(model: nn.Module) -> dict[str, Int8Layer]:
    """The layers of a model that have int8 weights, by name, in order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, (Int8SparseLowRankLinear, Int8Linear))}


def rounded(loaded: LoadedModel) -> LoadedModel:
    """A copy of a model with its compressed layers rounded to int8, or all linear layers of its blocks if none is compressed.

    The classifier is rounded, too, where it is one linear layer.

    Raises:
        InputError: the model is not compressed and has no chain of blocks, or a weight is not finite.
    """
    copied = copy.deepcopy(loaded)
    model = copied.timm_model
    if not int8_layers(model):
        layers: dict[str, nn.Module] = dict(compressed_layers(model))
        if not layers:
            layers = {layer.name: layer.module for block in adapt(model, copied.inputs).blocks for layer in block.linears}
        layers |= _classifier(model)
        for name, layer in layers.items():
            if isinstance(layer, (SparseLowRankLinear, nn.Linear)):
                replace_module(model, name, to_int8(layer))
    return copied


def _classifier(model: nn.Module) -> dict[str, nn.Module]:
    """The classifier of a timm model by name; empty if it has none, or one that is no linear layer."""
    found = getattr(model, "get_classifier", lambda: None)()
    return {name: module for name, module in model.named_modules() if module is found and isinstance(module, nn.Linear)}


def _mask_saves(layer: Int8SparseLowRankLinear) -> bool:
    """Whether the mask and the values of S take fewer bytes than S with its zeros."""
    return layer.nonzeros < layer.S_int8.numel() * 7 / 8


def _sparse(layer: Int8SparseLowRankLinear) -> dict[str, Tensor]:
    values, mask = (torch.from_numpy(array) for array in tiles.pack(layer.S_int8.detach().cpu().numpy()))
    return {"values": values, "mask": mask, "scale": layer.S_scale}


def _stacked(U: list[Tensor], U_scale: list[Tensor], V: list[Tensor], V_scale: list[Tensor]) -> dict[str, Tensor]:
    """U_i [d_i, r_i] and V_i [r_i, d_in] of all parts, with their scales, as constants of SparseMatMulInt8.

    Ranks are padded with zeros, to at least 1. Parts that differ in height, or whose height is no multiple of a strip, are
    merged into one, with the U_i as a block diagonal.
    """
    if len(U) > 1 and (len({len(u) for u in U}) > 1 or len(U[0]) % tiles.STRIP):
        U, V, V_scale = [torch.block_diag(*U)], [torch.cat(V)], [torch.cat(V_scale)]
    rank = max(1, *(len(v) for v in V))
    return {
        "U": _tiled(torch.cat([nn.functional.pad(u.detach(), (0, rank - u.shape[1])) for u in U])),
        "U_scale": torch.cat(U_scale),
        "V": _tiled(torch.stack([nn.functional.pad(v.detach(), (0, 0, 0, rank - len(v))) for v in V])),
        "V_scale": torch.stack([nn.functional.pad(scale.detach(), (0, rank - len(scale)), value=1.0) for scale in V_scale]),
    }


def _tiled(weights: Tensor) -> Tensor:
    return torch.from_numpy(tiles.tiled(weights.detach().cpu().numpy()))
