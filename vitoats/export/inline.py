"""Replaces the nodes of our operators by standard ones, for runtimes and tools without functions."""

import numpy as np
import onnx
import onnx.inliner
from onnx import TensorProto, helper, numpy_helper

from vitoats.export.names import name_after_layers
from vitoats.format.operator import DOMAIN

NUMBERS = {"value_int": np.int64, "value_float": np.float32}  # attributes of a Constant that is a number


def inlined(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A model with the body of each of our functions in the place of its nodes.

    Constants given as numbers, as attributes of functions are, become tensors: ONNX Runtime's shape inference knows no others.
    CastLike becomes Cast, since ONNX Runtime folds CastLike only inside functions. Where nothing is cast, it goes, since some
    converters to float16 do not change the type that a Cast names.
    """
    layers = {node.output[0]: node.name for node in proto.graph.node if node.domain == DOMAIN}
    proto = onnx.inliner.inline_local_functions(proto)
    graph = proto.graph
    floats = {tensor.name for tensor in graph.initializer if tensor.data_type == TensorProto.FLOAT}
    constants = {node.output[0]: node for node in graph.node if node.op_type == "Constant"}
    same: dict[str, str] = {}  # values by the name of their copy
    nodes = list(graph.node)
    del graph.node[:]
    for node in nodes:
        node.input[:] = [same.get(value, value) for value in node.input]
        if node.op_type == "Constant" and node.attribute[0].name in NUMBERS:
            _set_constant(node, np.array(helper.get_attribute_value(node.attribute[0]), NUMBERS[node.attribute[0].name]))
        if node.op_type == "CastLike":
            source = node.input[0]
            if source in floats:
                same[node.output[0]] = source
                continue
            if source in constants:
                number = numpy_helper.to_array(helper.get_attribute_value(constants[source].attribute[0]))
                node.op_type = "Constant"
                del node.input[:]
                _set_constant(node, number.astype(np.float32))
            else:
                node.op_type = "Cast"
                del node.input[1:]
                node.attribute.append(helper.make_attribute("to", TensorProto.FLOAT))
        graph.node.append(node)
    name_after_layers(graph, layers)
    return proto


def _set_constant(node: onnx.NodeProto, value: np.ndarray) -> None:
    del node.attribute[:]
    node.attribute.append(helper.make_attribute("value", numpy_helper.from_array(value)))
