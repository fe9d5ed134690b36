"""Names for the nodes and values of a traced graph, after the modules that they come from, as viewers show them.

blocks.0.attn.qkv                          a node of ours has its layer's name
blocks.0.norm1.LayerNormalization          other nodes: module and operator; a second one in the same module ends in .2
blocks.0.norm1.LayerNormalization.y        the output of a node; .y0, .y1, ... if it has several
blocks.0.attn.qkv/S                        a value in the body of blocks.0.attn.qkv, in a file without our nodes
constants.0                                constants that are no parameters
"""

from collections.abc import Mapping

import onnx
import onnx_ir as ir

from vitoats.export.graph import layer_name
from vitoats.format.operator import DOMAIN


def name_after_modules(graph: ir.Graph) -> None:
    """Renames the nodes, their outputs and the unnamed constants of a graph, in place; inputs and outputs keep their names."""
    for i, value in enumerate([v for v in graph.initializers.values() if (v.name or "").startswith("val_")]):
        value.name = f"constants.{i}"
    taken = {value.name for value in (*graph.inputs, *graph.outputs, *graph.initializers.values())}
    for node in graph:
        if node.domain != DOMAIN:
            node.name = _unused(".".join(filter(None, (layer_name(node), node.op_type))), taken)
        for i, value in enumerate(node.outputs):
            if not value.is_graph_output():
                value.name = _unused(f"{node.name}.y{i if len(node.outputs) > 1 else ''}", taken)


def name_after_layers(graph: onnx.GraphProto, layers: Mapping[str, str]) -> None:
    """Names the nodes without a name that were put in the place of ours, and the values between them, in place.

    Args:
        graph: the graph, with the nodes of each body in a row.
        layers: the name of our node by the name of its output, which is now that of the last node of its body.
    """
    body: list[onnx.NodeProto] = []
    renamed: dict[str, str] = {}
    for node in graph.node:
        if node.name:
            continue
        body.append(node)
        if node.output[0] in layers:
            layer = layers[node.output[0]]
            inner = {value for step in body[:-1] for value in step.output}
            renamed |= {value: f"{layer}/{value.rpartition('__')[0]}" for value in inner}
            for step in body:
                step.input[:] = [renamed.get(value, value) for value in step.input]
                step.output[:] = [renamed.get(value, value) for value in step.output]
                step.name = f"{step.output[0]}.{step.op_type}"
            body = []


def _unused(name: str, taken: set[str | None]) -> str:
    """The name, or with .2, .3, ... at its end if it is taken; it is then taken."""
    n, found = 1, name
    while found in taken:
        n += 1
        found = f"{name}.{n}"
    taken.add(found)
    return found
