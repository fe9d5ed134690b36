"""Small ONNX models of one SparseMatMul node, and ways to break them."""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from vitoats.export.onnx_file import IR_VERSION
from vitoats.export.sparse_matmul import sparse_matmul_function
from vitoats.format import bitmask
from vitoats.format.operator import DOMAIN, INPUTS, NAME, OPSET


def random_sparse(random: np.random.Generator, n: int, k: int, zeros: float, value_type: type = np.float32) -> np.ndarray:
    """S [n, k] with about that share of zeros; its values are exact in ``value_type``."""
    return random.standard_normal((n, k)).astype(value_type).astype(np.float32) * (random.random((n, k)) >= zeros)


def random_low_rank(
    random: np.random.Generator, n: int, k: int, blocks: int, rank: int, value_type: type = np.float32
) -> tuple[np.ndarray, np.ndarray]:
    """U [blocks, n / blocks, rank] and V [blocks, rank, k], exact in ``value_type``."""
    shapes = (blocks, n // blocks, rank), (blocks, rank, k)
    U, V = (random.standard_normal(shape).astype(value_type).astype(np.float32) for shape in shapes)
    return U, V


def operator_model(
    S: np.ndarray,
    value_type: type = np.float32,
    bias: np.ndarray | None = None,
    low_rank: tuple[np.ndarray, np.ndarray] | None = None,
    function: bool = True,
) -> onnx.ModelProto:
    """y = x (S + U V)^T + bias; x is an input [b, t, k], the rest are constants."""
    values, mask = bitmask.pack(S)
    n, k = S.shape
    constants = [numpy_helper.from_array(values.astype(value_type), "values"), numpy_helper.from_array(mask, "mask")]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", "t", k])]
    count = 6 if low_rank is not None else 3 if bias is None else 4
    if count > 3:
        constants.append(numpy_helper.from_array(np.zeros(n, np.float32) if bias is None else bias, "bias"))
    if low_rank is not None:
        constants += [numpy_helper.from_array(a.astype(value_type), name) for a, name in zip(low_rank, "UV", strict=True)]
    node = helper.make_node(NAME, list(INPUTS[:count]), ["y"], name="layer", domain=DOMAIN, in_features=k)
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", "t", n])
    graph = helper.make_graph([node], "operator", inputs, [output], constants)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
    functions = [sparse_matmul_function(count)] if function else []
    return helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=IR_VERSION)


def replace_constant(model: onnx.ModelProto, name: str, array: np.ndarray) -> onnx.ModelProto:
    """The model with another constant of that name."""
    tensor = next(t for t in model.graph.initializer if t.name == name)
    tensor.CopyFrom(numpy_helper.from_array(array, name))
    return model
