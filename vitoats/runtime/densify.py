"""Replaces the nodes of linear layers by standard ones with dense weights, for a session without the native library.

ONNX Runtime would also unpack the weights, but it keeps every intermediate result until the last layer is done. That takes ten
times as long and several times the memory. Attention has no weights: its function is as good.
"""

from pathlib import Path
from typing import Any

import numpy as np

from vitoats.format import bitmask, tiles
from vitoats.format.operator import COMPOSITES, DOMAIN, INPUTS, INT8_OPERATORS, LINEAR

LARGEST_MODEL = 2**31 - 1  # bytes; the limit of protobuf
CONTRIB = "com.microsoft"  # ONNX Runtime's own operators, of which Gelu is one


def densified(path: Path) -> bytes | None:
    """The bytes of an ONNX model with a MatMul, and what is around it, instead of each node of a linear layer.

    Returns:
        the model, or None if ONNX Runtime has to take the file as it is: the package onnx is not installed, the file is
        unusual, or the dense model would exceed the limit of protobuf.
    """
    try:
        import onnx
        from onnx import helper, numpy_helper
    except ImportError:
        return None
    try:
        model = onnx.load(str(path))
        graph = model.graph
        tensors = {t.name: t for t in graph.initializer}
        nodes = [stage for node in graph.node for stage in _stages(node)]
        del graph.node[:]
        for node in nodes:
            if node.domain != DOMAIN or node.op_type not in LINEAR:
                graph.node.append(node)
                continue
            operator = INT8_OPERATORS.get(node.op_type)
            inputs = dict(zip(operator.inputs if operator else INPUTS, node.input, strict=False))
            attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
            constants = {name: numpy_helper.to_array(tensors[i]) for name, i in inputs.items() if i in tensors}
            unpacked = _int8_weights if operator else _float_weights
            weight = f"{node.name or node.output[0]}.dense"
            W = unpacked(constants, attributes["in_features"])
            graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(W.T), weight))
            value, steps = inputs["x"], _steps(inputs, attributes, weight, node.op_type.endswith("Gelu"))
            for i, (op_type, others, more) in enumerate(steps, 1):
                result = node.output[0] if i == len(steps) else f"{weight}.{i}"
                graph.node.append(helper.make_node(op_type, [value, *others], [result], f"{weight}.{op_type}.{i}", **more))
                value = result
        used = {name for node in graph.node for name in node.input}
        kept = [t for t in graph.initializer if t.name in used]
        del graph.initializer[:]
        graph.initializer.extend(kept)
        if any(node.domain == CONTRIB for node in graph.node):
            model.opset_import.append(helper.make_opsetid(CONTRIB, 1))
        return model.SerializeToString() if model.ByteSize() <= LARGEST_MODEL else None
    except Exception:  # ONNX Runtime will report what is wrong with the file
        return None


def _stages(node: Any) -> list[Any]:
    """The nodes that a node of several operators stands for; the node itself if it is of one."""
    from onnx import helper

    if node.domain != DOMAIN or node.op_type not in COMPOSITES:
        return [node]
    whole = COMPOSITES[node.op_type]
    values = dict(zip(whole.inputs, node.input, strict=True))
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    stages, x = [], node.input[0]
    for i, stage in enumerate(whole.stages, 1):
        y = node.output[0] if i == len(whole.stages) else f"{node.output[0]}.{i}"
        inputs = [x, *(values[name] for name in stage.inputs)]
        own = {own: attributes[name] for own, name in stage.attributes.items()}
        name = f"{node.name or node.output[0]}.{i}"
        stages.append(helper.make_node(stage.operator.name, inputs, [y], name, domain=DOMAIN, **own))
        x = y
    return stages


def _float_weights(constants: dict[str, np.ndarray], k: int) -> np.ndarray:
    """S + U V, float32 [n, k], of a SparseMatMul."""
    W = bitmask.unpack(constants["values"].astype(np.float32), constants["mask"], k)
    if "U" in constants:
        W += (constants["U"].astype(np.float32) @ constants["V"].astype(np.float32)).reshape(W.shape)
    return W


def _int8_weights(constants: dict[str, np.ndarray], k: int) -> np.ndarray:
    """What int8 weights stand for, float32 [n, k]."""
    scale = constants["scale"]
    n = len(scale)
    if "weight" in constants:
        return scale[:, None] * tiles.untiled(constants["weight"], n, k)
    W = scale[:, None] * tiles.unpack(constants["values"], constants["mask"], n, k)
    parts, rank = constants["V_scale"].shape
    U = constants["U_scale"][:, None] * tiles.untiled(constants["U"], n, rank)
    V = constants["V_scale"][..., None] * tiles.untiled(constants["V"], rank, k)
    return W + (U.reshape(parts, n // parts, rank) @ V).reshape(n, k)


def _steps(
    inputs: dict[str, str], attributes: dict[str, Any], weight: str, gelu: bool
) -> list[tuple[str, list[str], dict[str, Any]]]:
    """The operators that a node does one after the other, each with its inputs after the first, and its attributes."""
    steps: list[tuple[str, list[str], dict[str, Any]]] = []
    if "norm_weight" in inputs:
        norm = {"axis": -1, "epsilon": attributes["epsilon"]}
        steps.append(("LayerNormalization", [inputs["norm_weight"], inputs["norm_bias"]], norm))
    steps.append(("MatMul", [weight], {}))
    if "bias" in inputs:
        steps.append(("Add", [inputs["bias"]], {}))
    if gelu:
        steps.append(("Gelu", [], {"domain": CONTRIB}))
    if "residual" in inputs:
        steps.append(("Add", [inputs["residual"]], {}))
    return steps
