"""SparseMatMul nodes as plain MatMul and Add with dense weights, for a session without the native library.

ONNX Runtime would unpack the weights too, but keeps every step of it until the last layer is done: that takes ten times as long
and several times the memory.
"""

from pathlib import Path

import numpy as np

from vitoats.format import bitmask
from vitoats.format.operator import DOMAIN, NAME

LARGEST_MODEL = 2**31 - 1  # bytes, of a protobuf


def densified(path: Path) -> bytes | None:
    """An ONNX file's bytes with a MatMul for each SparseMatMul.

    Returns:
        the model, or None where that is left to ONNX Runtime: the package onnx is not installed, the file is unusual, or the
        dense model would be larger than one message can be.
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
    except Exception:  # whatever is wrong with the file, ONNX Runtime says it
        return None
