"""Small ONNX models of one product y = x W^T, W [n, k]: dense, in ONNX Runtime's int8, and sparse with the native operator.

A model computes the product ``copies`` times from the same x, each time with different weights. One run then passes over more
weights than the last-level cache holds, so they come from memory. The same happens in a whole model, where the other layers
evict them. ``vitoats.benchmark.products`` chooses the number of copies; ``int8_products`` has the native int8 operators.
"""

from collections.abc import Callable

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from vitoats.export.onnx_file import IR_VERSION
from vitoats.format import bitmask
from vitoats.format.operator import DOMAIN, DOMAIN_VERSION, NAME, OPSET

CONTRIB = "com.microsoft"  # ONNX Runtime's own operators


def dense_model(W: np.ndarray, copies: int) -> onnx.ModelProto:
    """x W^T as MatMul."""
    weights = np.ascontiguousarray(W.T)
    return product_model(W.shape, copies, ("", "MatMul"), lambda i: {"w": np.roll(weights, i, axis=0)})


def int8_model(W: np.ndarray, copies: int) -> onnx.ModelProto:
    """x W^T with int8 weights, one scale per output; activations are quantized at each call."""
    scale = np.abs(W).max(axis=1) / 127
    weights = np.ascontiguousarray(np.round(W / scale[:, None]).astype(np.int8).T)
    others = {"scale": scale, "zero": np.zeros_like(scale, np.int8)}
    operator = (CONTRIB, "DynamicQuantizeMatMul")
    return product_model(W.shape, copies, operator, lambda i: {"w": np.roll(weights, i, axis=0)} | others)


def sparse_model(
    S: np.ndarray, copies: int, float16: bool = False, low_rank: tuple[np.ndarray, np.ndarray] | None = None
) -> onnx.ModelProto:
    """x S^T as SparseMatMul, or x (S + U V)^T with a bias of zeros.

    Args:
        S: [n, k] with explicit zeros.
        copies: number of products.
        float16: store the non-zeros as float16.
        low_rank: U [parts, n / parts, r] and V [parts, r, k].
    """
    values, mask = bitmask.pack(S)
    values = values.astype(np.float16) if float16 else values
    starts = np.concatenate([[0], np.cumsum(np.count_nonzero(S, axis=1))])

    def constants(i: int) -> dict[str, np.ndarray]:
        i %= len(S)
        found = {"values": np.roll(values, -starts[i]), "mask": np.roll(mask, -i, axis=0)}
        if low_rank is not None:
            U, V = low_rank
            found |= {"bias": np.zeros(len(S), np.float32), "U": np.roll(U, i, axis=1), "V": np.roll(V, i, axis=2)}
        return found

    return product_model(S.shape, copies, (DOMAIN, NAME), constants, in_features=S.shape[1])


def product_model(
    shape: tuple[int, ...],
    copies: int,
    operator: tuple[str, str],
    constants: Callable[[int], dict[str, np.ndarray]],
    domain_version: int = DOMAIN_VERSION,
    **attributes: int,
) -> onnx.ModelProto:
    """A model that computes a product ``copies`` times.

    The first product is an output of the model. The others contribute one number each to a second output, so that ONNX Runtime
    neither skips them nor keeps them.

    Args:
        shape: [n, k].
        copies: number of products.
        operator: domain and name of the operator.
        constants: its inputs but x by name, in order, for each copy; no two copies alike, since ONNX Runtime merges equal ones.
        domain_version: version of our domain.
        attributes: the operator's attributes.
    """
    domain, op = operator
    n, k = shape
    indices = [numpy_helper.from_array(np.array(v, np.int64), name) for v, name in (([0, 0, 0], "from"), ([1, 1, 1], "to"))]
    graph = helper.make_graph([], "op", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", "t", k])], [], indices)
    for i in range(copies):
        tensors = [numpy_helper.from_array(array, f"{name}{i}") for name, array in constants(i).items()]
        graph.initializer.extend(tensors)
        graph.node.append(helper.make_node(op, ["x", *(t.name for t in tensors)], [f"y{i}"], domain=domain, **attributes))
        if i:
            graph.node.append(helper.make_node("Slice", [f"y{i}", "from", "to"], [f"one{i}"]))
    graph.output.append(helper.make_tensor_value_info("y0", TensorProto.FLOAT, ["b", "t", n]))
    if copies > 1:
        graph.node.append(helper.make_node("Concat", [f"one{i}" for i in range(1, copies)], ["others"], axis=0))
        graph.output.append(helper.make_tensor_value_info("others", TensorProto.FLOAT, ["c", 1, 1]))
    versions = {"": OPSET, DOMAIN: domain_version, CONTRIB: 1}
    opsets = [helper.make_opsetid(name, version) for name, version in versions.items()]
    return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
