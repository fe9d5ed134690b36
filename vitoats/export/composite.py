"""The bodies of operators that are several others in a row: the bodies of these, one behind the other."""

import onnx

from vitoats.export.int8_matmul import int8_matmul_function
from vitoats.export.qkv_attention import qkv_attention_function
from vitoats.format.operator import DOMAIN, OPSET, Composite, Int8MatMul, Stage


def composite_function(operator: Composite, head_width: int | None = None) -> onnx.FunctionProto:
    """The body of a composite.

    Args:
        operator: the composite.
        head_width: width of a head, as for ``qkv_attention_function``.
    """
    nodes: list[onnx.NodeProto] = []
    value = "x"
    for i, stage in enumerate(operator.stages, 1):
        output = "y" if i == len(operator.stages) else f"y{i}"
        nodes += _stage_nodes(stage, value, output, f"stage{i}.", head_width)
        value = output
    opsets = [onnx.helper.make_opsetid("", OPSET)]
    return onnx.helper.make_function(
        DOMAIN, operator.name, operator.inputs, ["y"], nodes, opsets, attributes=list(operator.attributes)
    )


def _stage_nodes(stage: Stage, x: str, y: str, prefix: str, head_width: int | None) -> list[onnx.NodeProto]:
    """The nodes of a stage's body with the composite's names; names of values inside it begin with ``prefix``."""
    operator = stage.operator
    function = int8_matmul_function(operator) if isinstance(operator, Int8MatMul) else qkv_attention_function(head_width)
    names = dict(zip(function.input, (x, *stage.inputs), strict=True)) | {function.output[0]: y}
    nodes = list(function.node)
    for node in nodes:
        for values in (node.input, node.output):
            values[:] = [names.get(name, prefix + name) if name else "" for name in values]
        for attribute in node.attribute:
            if attribute.ref_attr_name:
                attribute.ref_attr_name = stage.attributes[attribute.ref_attr_name]
    return nodes
