"""Puts a model's layers into the form that is traced."""

import logging
from typing import Any

from torch import nn

from vitoats.export.int8_layers import ExportedInt8Layer, Int8Layer, int8_layers
from vitoats.export.layers import ExportedSparseLowRankLinear, LowRankForm
from vitoats.format import bitmask
from vitoats.format.layers import SparseLowRankLinear, compressed_layers, replace_module

log = logging.getLogger("vitoats")


def warn_of_filled_layers(model: nn.Module, about: dict[str, Any]) -> None:
    """Warns of layers with more non-zeros than compress left in them: an optimizer has filled them.

    Args:
        model: the model.
        about: the content of its vitoats.json.
    """
    written = {figures["name"]: figures for figures in about.get("layers", ())}
    filled = [
        name
        for name, layer in compressed_layers(model).items()
        if name in written and layer.nonzeros > written[name].get("nonzeros", layer.nonzeros)
    ]
    if filled:
        log.warning(
            "%d compressed layers have more non-zeros than compress left, such as %s: whatever changed S has filled it (see "
            "'Fine-tuning a compressed model' in docs/models.md)",
            len(filled),
            filled[0],
        )


def fold(model: nn.Module, everything: bool) -> None:
    """Replaces compressed layers by dense ones, in place.

    Args:
        model: the model.
        everything: all layers, or only those in float32 whose values and mask would save no bytes.
    """
    full = []
    for name, layer in [*compressed_layers(model).items(), *int8_layers(model).items()]:
        saves = isinstance(layer, Int8Layer) or bitmask.saves(layer.out_features, layer.in_features, layer.kept_parameters)
        if not saves:
            full.append(name)
        if everything or not saves:
            replace_module(model, name, layer.folded())  # a dense product is faster, and no larger
    if full and not everything:
        log.warning(
            "%d compressed layers are written dense, since values and mask would take as many bytes: %s",
            len(full),
            ", ".join(full[:4]),
        )


def prepare(model: nn.Module, matmul: bool, float16: bool) -> bool:
    """Replaces compressed layers by modules that trace to our operators, in place, and fused attention by its steps.

    Args:
        model: the model.
        matmul: low-rank terms of float32 layers as MatMuls.
        float16: store their weights as float16.

    Returns:
        whether there are any such layers.
    """
    int8 = int8_layers(model)
    sparse = {name: layer for name, layer in compressed_layers(model).items() if isinstance(layer, SparseLowRankLinear)}
    low_rank: LowRankForm = "nodes" if matmul else "inputs"
    if not any(layer.rank for layer in sparse.values()):
        low_rank = "none"
    for name, layer in sparse.items():
        replace_module(model, name, ExportedSparseLowRankLinear(layer, low_rank, float16))
    for name, int8_layer in int8.items():
        replace_module(model, name, ExportedInt8Layer(int8_layer))
    for module in model.modules():
        if hasattr(module, "fused_attn"):  # fused attention is exported as more nodes, not fewer
            module.fused_attn = False  # type: ignore[assignment]
    return bool(sparse or int8)
