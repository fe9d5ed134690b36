"""Small ONNX models of one int8 operator or of attention, and what they compute, in float64."""

import math
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from vitoats.export.int8_matmul import int8_matmul_function
from vitoats.export.onnx_file import IR_VERSION
from vitoats.export.qkv_attention import qkv_attention_function
from vitoats.format.operator import (
    DENSE_INT8,
    DOMAIN,
    INT8_OPERATORS,
    NEWEST_DOMAIN_VERSION,
    OPSET,
    QKV_ATTENTION,
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


def _model(graph: onnx.GraphProto, functions: list[onnx.FunctionProto]) -> onnx.ModelProto:
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, NEWEST_DOMAIN_VERSION)]
    return helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=IR_VERSION)
