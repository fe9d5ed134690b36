"""Replaces SparseMatMul nodes by MatMul and Add with dense weights, for a session without the native library.

ONNX Runtime would also unpack the weights, but it keeps every intermediate result until the last layer is done. That takes ten
times as long and several times the memory.
"""

from pathlib import Path

import numpy as np

from vitoats.format import bitmask
from vitoats.format.operator import DOMAIN, NAME

LARGEST_MODEL = 2**31 - 1  # bytes; the limit of protobuf


def densified(path: Path) -> bytes | None:
    """The bytes of an ONNX model with a MatMul instead of each SparseMatMul.

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
        nodes = list(graph.node)

        def array(name: str) -> np.ndarray:
            return numpy_helper.to_array(tensors[name]).astype(np.float32)

        del graph.node[:]
        for node in nodes:
            graph.node.append(node)
            if (node.domain, node.op_type) != (DOMAIN, NAME):
                continue
            x, values, mask, *bias_U_V = node.input
            (columns,) = (a.i for a in node.attribute if a.name == "in_features")
            bias, U, V = [*bias_U_V, "", "", ""][:3]
            W = bitmask.unpack(array(values), numpy_helper.to_array(tensors[mask]), columns)
            if U:
                W += (array(U) @ array(V)).reshape(W.shape)
            weight, y = f"{node.name or node.output[0]}.dense", node.output[0]
            graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(W.T), weight))
            product = f"{weight}.product" if bias else y
            graph.node[-1].CopyFrom(helper.make_node("MatMul", [x, weight], [product], node.name))
            if bias:
                graph.node.append(helper.make_node("Add", [product, bias], [y], f"{node.name}.bias"))
        used = {name for node in graph.node for name in node.input}
        kept = [t for t in graph.initializer if t.name in used]
        del graph.initializer[:]
        graph.initializer.extend(kept)
        return model.SerializeToString() if model.ByteSize() <= LARGEST_MODEL else None
    except Exception:  # ONNX Runtime will report what is wrong with the file
        return None
