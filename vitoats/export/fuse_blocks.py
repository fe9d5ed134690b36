"""Makes the int8 nodes of a block that follow each other one node.

LayerNorm...Gelu, ...Add of what is normalized        ->  LayerNorm...Gelu...Add: an MLP with its residual sum
LayerNorm... to qkv, QKVAttention                     ->  LayerNorm...QKVAttention
"""

import onnx_ir as ir

from vitoats.export.graph import consumers, replace
from vitoats.format.operator import DOMAIN, Composite, composite


def fuse_blocks(graph: ir.Graph) -> None:
    """Fuses the int8 nodes of a graph, in place."""
    for first in list(graph):
        readers = consumers(first.outputs[0]) if first.domain == DOMAIN else []
        if len(readers) != 1 or readers[0].domain != DOMAIN:
            continue
        second = readers[0]
        whole = composite(first.op_type, second.op_type)
        inputs = None if whole is None else _inputs(whole, first, second)
        if whole is None or inputs is None:
            continue
        attributes = {
            name: node.attributes[own].value
            for stage, node in zip(whole.stages, (first, second), strict=True)
            for own, name in stage.attributes.items()
        }
        name = _module_of_both(first.name or "", second.name or "")
        replace([first, second], whole.name, name, inputs, attributes)


def _inputs(whole: Composite, first: ir.Node, second: ir.Node) -> list[ir.Value | None] | None:
    """The inputs of the composite; None if an input of the second node that should be x is another value."""
    values = {"x": first.inputs[0]}
    if second.inputs[0] is not first.outputs[0]:
        return None
    for stage, node in zip(whole.stages, (first, second), strict=True):
        for name, value in zip(stage.inputs, node.inputs[1:], strict=True):
            if values.setdefault(name, value) is not value:
                return None
    return [values[name] for name in whole.inputs]


def _module_of_both(first: str, second: str) -> str:
    """The name of the module that has both layers."""
    parts = []
    for a, b in zip(first.split("."), second.split("."), strict=False):
        if a != b:
            break
        parts.append(a)
    return ".".join(parts) or first
