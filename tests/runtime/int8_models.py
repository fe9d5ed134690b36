"""Small ONNX models of one int8 operator or of attention, and what they compute, in float64."""

import math
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from vitoats.export.composite import composite_function
from vitoats.export.int8_matmul import int8_matmul_function
from vitoats.export.onnx_file import IR_VERSION
from vitoats.export.qkv_attention import qkv_attention_function
from vitoats.format.operator import (
    COMPOSITES,
    DENSE_INT8,
    DOMAIN,
    INT8_OPERATORS,
    NEWEST_DOMAIN_VERSION,
    OPSET,
    QKV_ATTENTION,
    Composite,
    Int8MatMul,
)
from vitoats.format.tiles import pack, tiled

EPSILON = 1e-5


@dataclass
class Int8Case:
    """Random weights of one operator.

    Attributes:
        operator: the operator.
        constants: its constants by name, in the layout of the file.
        W: [n, k], the float64 matrix that they stand for.
    """

    operator: Int8MatMul
    constants: dict[str, np.ndarray]
    W: np.ndarray

    def expected(self, x: np.ndarray, residual: np.ndarray | None = None) -> np.ndarray:
        """The operator's result for activations that are not quantized."""
        x, constants = x.astype(np.float64), self.constants
        if self.operator.layer_norm:
            centered = x - x.mean(-1, keepdims=True)
            x = centered / np.sqrt((centered**2).mean(-1, keepdims=True) + EPSILON)
            x = x * constants["norm_weight"] + constants["norm_bias"]
        y = x @ self.W.T + constants["bias"]
        if self.operator.suffix == "Gelu":
            y = y * (1 + np.vectorize(math.erf)(y / math.sqrt(2))) / 2
        return y + residual if self.operator.suffix == "Add" else y


def random_case(
    random: np.random.Generator, name: str, n: int, k: int, zeros: float = 0.5, parts: int = 1, rank: int = 3
) -> Int8Case:
    """Weights of [n, k] with about that share of zeros, and a low-rank term of that rank in each of the parts."""
    operator = INT8_OPERATORS[name]

    def integers(*shape: int) -> np.ndarray:
        return random.integers(-127, 128, shape).astype(np.int8)

    def scales(*shape: int) -> np.ndarray:
        return (random.uniform(-1, 1, shape) / 100).astype(np.float32)

    S, scale = integers(n, k) * (random.random((n, k)) >= zeros), scales(n)
    constants = {"scale": scale, "bias": random.standard_normal(n, np.float32)}
    constants |= {name: random.standard_normal(k, np.float32) for name in ("norm_weight", "norm_bias")}
    W = scale.astype(np.float64)[:, None] * S
    if operator.weights == DENSE_INT8:
        constants["weight"] = tiled(S)
    else:
        constants["values"], constants["mask"] = pack(S)
        U, V, U_scale, V_scale = integers(n, rank), integers(parts, rank, k), scales(n), scales(parts, rank)
        constants |= {"U": tiled(U), "V": tiled(V), "U_scale": U_scale, "V_scale": V_scale}
        U_of_parts = (U_scale.astype(np.float64)[:, None] * U).reshape(parts, n // parts, rank)
        W = W + (U_of_parts @ (V_scale.astype(np.float64)[..., None] * V)).reshape(n, k)
    return Int8Case(operator, {name: constants[name] for name in operator.inputs if name in constants}, W)


def int8_model(case: Int8Case, function: bool = True) -> onnx.ModelProto:
    """A model of one node "layer": x [b, t, k], and residual [b, t, n] for "Add", are inputs, the rest are constants."""
    operator, (n, k) = case.operator, case.W.shape
    attributes = {"in_features": k, **({"epsilon": EPSILON} if operator.layer_norm else {})}
    node = helper.make_node(operator.name, operator.inputs, ["y"], name="layer", domain=DOMAIN, **attributes)
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", "t", k])]
    if operator.suffix == "Add":
        inputs.append(helper.make_tensor_value_info("residual", TensorProto.FLOAT, ["b", "t", n]))
    constants = [numpy_helper.from_array(array, name) for name, array in case.constants.items()]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", "t", n])
    graph = helper.make_graph([node], "operator", inputs, [output], constants)
    return _model(graph, [int8_matmul_function(operator)] if function else [])


def attention_model(heads: int, width: int, scale: float, bfloat16: int = 0, function: bool = True) -> onnx.ModelProto:
    """A model of one QKVAttention node "attention": qkv [b, t, 3 heads width] is its input."""
    attributes = {"num_heads": heads, "scale": scale, "bfloat16": bfloat16}
    node = helper.make_node(QKV_ATTENTION.name, QKV_ATTENTION.inputs, ["y"], name="attention", domain=DOMAIN, **attributes)
    qkv = helper.make_tensor_value_info("qkv", TensorProto.FLOAT, ["b", "t", 3 * heads * width])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", "t", heads * width])
    return _model(helper.make_graph([node], "operator", [qkv], [y]), [qkv_attention_function()] if function else [])


def attention(qkv: np.ndarray, heads: int, scale: float) -> np.ndarray:
    """softmax(scale q k^T) v for each head, in float64."""
    b, t, width = qkv.shape
    q, k, v = qkv.astype(np.float64).reshape(b, t, 3, heads, width // (3 * heads)).transpose(2, 0, 3, 1, 4)
    scores = scale * q @ k.swapaxes(-1, -2)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return (weights @ v).swapaxes(1, 2).reshape(b, t, width // 3)


@dataclass
class CompositeCase:
    """Random weights of a composite.

    Attributes:
        operator: the composite.
        products: weights of the stages that are products.
        width: number of inputs.
        heads: of attention; 0 for an MLP.
        scale: of attention's scores.
    """

    operator: Composite
    products: list[Int8Case]
    width: int
    heads: int = 0
    scale: float = 0.0

    @property
    def constants(self) -> dict[str, np.ndarray]:
        """The constants by their names in the composite."""
        return {
            name: case.constants[own]
            for stage, case in zip(self.operator.stages, self.products, strict=False)
            for own, name in zip(stage.operator.inputs[1:], stage.inputs, strict=True)
            if own in case.constants
        }

    @property
    def attributes(self) -> dict[str, int | float]:
        found = {"in_features": self.width, "epsilon": EPSILON}
        if self.heads:
            return found | {"num_heads": self.heads, "scale": self.scale, "bfloat16": 0}
        return found | {"hidden_features": self.products[1].W.shape[1]}

    def expected(self, x: np.ndarray) -> np.ndarray:
        """The result for activations that are not quantized."""
        first = self.products[0].expected(x)
        return attention(first, self.heads, self.scale) if self.heads else self.products[1].expected(first, x)


def random_composite(random: np.random.Generator, name: str, width: int, hidden: int, heads: int = 2) -> CompositeCase:
    """An MLP [width -> hidden -> width], or attention of that many heads of the width ``hidden``."""
    operator = COMPOSITES[name]
    first, second = (stage.operator for stage in operator.stages)
    if second.name == QKV_ATTENTION.name:
        parts = 3 if heads * hidden % 16 == 0 else 1
        return CompositeCase(
            operator, [random_case(random, first.name, 3 * heads * hidden, width, parts=parts)], width, heads, hidden**-0.5
        )
    return CompositeCase(
        operator, [random_case(random, first.name, hidden, width), random_case(random, second.name, width, hidden)], width
    )


def composite_model(case: CompositeCase, function: bool = True) -> onnx.ModelProto:
    """A model of one node "layer": x [b, t, width] is its input, the rest are constants."""
    node = helper.make_node(case.operator.name, case.operator.inputs, ["y"], name="layer", domain=DOMAIN, **case.attributes)
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", "t", case.width])]
    last = len(case.products[0].W) // 3 if case.heads else case.width
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", "t", last])
    constants = [numpy_helper.from_array(array, name) for name, array in case.constants.items()]
    graph = helper.make_graph([node], "operator", inputs, [output], constants)
    return _model(graph, [composite_function(case.operator)] if function else [])


def stages_model(case: CompositeCase) -> onnx.ModelProto:
    """The same model with a node for each stage."""
    nodes, x = [], "x"
    for i, stage in enumerate(case.operator.stages, 1):
        attributes = {own: case.attributes[name] for own, name in stage.attributes.items()}
        y = "y" if i == len(case.operator.stages) else f"y{i}"
        nodes.append(helper.make_node(stage.operator.name, [x, *stage.inputs], [y], f"stage{i}", domain=DOMAIN, **attributes))
        x = y
    model = composite_model(case, function=False)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def _model(graph: onnx.GraphProto, functions: list[onnx.FunctionProto]) -> onnx.ModelProto:
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, NEWEST_DOMAIN_VERSION)]
    return helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=IR_VERSION)
