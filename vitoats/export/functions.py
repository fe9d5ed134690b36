"""The functions that a file needs, so that it runs without our operators."""

import onnx

from vitoats.export.composite import composite_function
from vitoats.export.int8_matmul import int8_matmul_function
from vitoats.export.qkv_attention import qkv_attention_function
from vitoats.export.sparse_matmul import sparse_matmul_function
from vitoats.format.operator import ATTENTION, COMPOSITES, DOMAIN, DOMAIN_VERSION, INT8_OPERATORS, NAME, OPERATORS


def add_functions(proto: onnx.ModelProto) -> None:
    """Adds the function of each of our operators that a model uses, and imports the oldest version of the domain that has them.

    The nodes of one operator all have the same number of inputs. A function imports the model's version of the standard
    operators, which since ``OPSET`` compute the same.
    """
    (standard,) = (opset.version for opset in proto.opset_import if opset.domain == "")
    used = {node.op_type: len(node.input) for node in proto.graph.node if node.domain == DOMAIN}
    for name, n_inputs in sorted(used.items(), key=lambda item: item[0] != NAME):
        if name == NAME:
            function = sparse_matmul_function(n_inputs)
        elif name == ATTENTION:
            function = qkv_attention_function(_head_width(proto.graph))
        elif name in COMPOSITES:
            function = composite_function(COMPOSITES[name], _head_width(proto.graph))
        else:
            function = int8_matmul_function(INT8_OPERATORS[name])
        for opset in function.opset_import:
            opset.version = standard if opset.domain == "" else opset.version
        proto.functions.append(function)
    kept = [opset for opset in proto.opset_import if opset.domain != DOMAIN]
    del proto.opset_import[:]
    proto.opset_import.extend(kept)
    if used:
        version = max(OPERATORS[name].since_version if name in OPERATORS else DOMAIN_VERSION for name in used)
        proto.opset_import.append(onnx.helper.make_opsetid(DOMAIN, version))


def _head_width(graph: onnx.GraphProto) -> int | None:
    """The width of a head in all attention nodes; None if they differ."""
    shapes = {info.name: info.type.tensor_type.shape for info in (*graph.value_info, *graph.output)}
    widths = {
        shapes[node.output[0]].dim[2].dim_value // onnx.helper.get_node_attr_value(node, "num_heads")
        for node in graph.node
        if node.domain == DOMAIN and node.op_type.endswith(ATTENTION)
    }
    return widths.pop() if len(widths) == 1 else None
