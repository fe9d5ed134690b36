"""Puts our operators in the place of the matrix products of a decoder's graph.

MatMul by constant weights [K, N], and the constant bias added after it   ->   one node of ours

The layer of a product is the one whose dense weights have exactly its weights as rows. It is found by content, not by name: the
builder of the graph splits fused layers and renames them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch import nn

from vitoats.common.errors import RunError
from vitoats.export.graph import constant, only_consumer, other_input, replace
from vitoats.export.int8_layers import ExportedInt8Layer
from vitoats.export.layers import ExportedSparseLowRankLinear, LowRankForm
from vitoats.export.rows import Layer, rows_of
from vitoats.format import bitmask
from vitoats.format.int8_layers import Int8Linear, Int8SparseLowRankLinear, to_int8
from vitoats.format.layers import SparseLowRankLinear, linear
from vitoats.format.operator import NAME


@dataclass(frozen=True)
class _Product:
    """A product x W^T + bias.

    Attributes:
        nodes: the MatMul, and the Add.
        x: its input.
        W: [N, K].
        bias: [N] or None.
    """

    nodes: list[ir.Node]
    x: ir.Value
    W: np.ndarray
    bias: np.ndarray | None


def swap_products(model: ir.Model, layers: Mapping[str, Layer], float16: bool, int8: bool) -> None:
    """Replaces products of a graph, in place.

    Args:
        model: the dense graph.
        layers: the compressed layers by name. A float32 layer whose values and mask would save no bytes stays as it is.
        float16: store S, U and V of float32 layers as float16.
        int8: round all weights to int8, those of dense layers and of the head, too.

    Raises:
        RunError: a layer is not in the graph.
    """
    rows = _Rows(layers)
    ranks = any(isinstance(layer, SparseLowRankLinear) and layer.rank for layer in layers.values())
    low_rank: LowRankForm = "inputs" if ranks else "none"
    for product in list(_products(model.graph)):
        layer = rows.layer_of(product.W)
        if int8 and not isinstance(layer, (Int8SparseLowRankLinear, Int8Linear)):
            layer = to_int8(layer if isinstance(layer, SparseLowRankLinear) else _dense(product))
        if isinstance(layer, (Int8SparseLowRankLinear, Int8Linear)):
            _swap(product, exported := ExportedInt8Layer(layer), exported.operator.name)
        elif isinstance(layer, SparseLowRankLinear) and _saves(layer):
            _swap(product, ExportedSparseLowRankLinear(layer, low_rank, float16), NAME)
    rows.check_all_found()
    RemoveUnusedNodesPass()(model)


def _products(graph: ir.Graph) -> Iterator[_Product]:
    for node in graph:
        if node.domain != "" or node.op_type != "MatMul":
            continue
        x, weights = node.inputs
        W = constant(weights)
        if x is None or W is None or W.ndim != 2:
            continue
        add = only_consumer(y := node.outputs[0], "Add")
        bias = None if add is None else constant(other_input(add, y))
        if add is None or bias is None or bias.shape != (W.shape[1],):
            yield _Product([node], x, W.T, None)
        else:
            yield _Product([node, add], x, W.T, bias)


def _dense(product: _Product) -> nn.Linear:
    bias = None if product.bias is None else torch.tensor(product.bias)
    return linear(torch.tensor(product.W), bias)


def _saves(layer: SparseLowRankLinear) -> bool:
    return bitmask.saves(layer.out_features, layer.in_features, layer.kept_parameters)


def _swap(product: _Product, exported: ExportedSparseLowRankLinear | ExportedInt8Layer, op_type: str) -> None:
    """Replaces a product; the node keeps its name, and its bias is that of the graph."""
    constants = {name: tensor.detach().numpy() for name, tensor in exported.constants.items()}
    constants["bias"] = np.zeros(len(product.W), np.float32) if product.bias is None else product.bias
    matmul = product.nodes[0]
    graph = matmul.graph
    assert isinstance(graph, ir.Graph)
    assert matmul.name is not None
    layer = matmul.name.removesuffix("/MatMul").strip("/").replace("/", ".")
    values = []
    for name, array in constants.items():
        full = f"{layer}.{op_type}.{name}"
        tensor = ir.tensor(array, name=full)
        values.append(ir.Value(name=full, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor))
        graph.register_initializer(values[-1])
    replace(product.nodes, op_type, matmul.name, [product.x, *values], {"in_features": exported.in_features})


class _Rows:
    """Finds layers by rows of their dense weights."""

    def __init__(self, layers: Mapping[str, Layer]):
        self.layers = layers
        self.found: dict[str, int] = dict.fromkeys(layers, 0)  # number of rows in products
        self.places: dict[tuple[int, int], list[tuple[str, int]]] = {}  # layers and rows by width and hash of the row
        for name, layer in layers.items():
            for i, row in enumerate(_weight(layer)):
                self.places.setdefault((len(row), hash(row.tobytes())), []).append((name, i))

    def layer_of(self, W: np.ndarray) -> Layer | None:
        """The layer, or the part of one, with the weights W [N, K]; None if W is dense in the model, too."""
        n, k = W.shape
        for name, start in self.places.get((k, hash(W[0].tobytes())), []):
            if np.array_equal(_weight(self.layers[name])[start : start + n], W):
                self.found[name] += n
                return rows_of(self.layers[name], start, start + n)
        return None

    def check_all_found(self) -> None:
        """Raises RunError if a layer is not in the graph as a whole."""
        for name, rows in self.found.items():
            if rows < self.layers[name].out_features:
                raise RunError(f"the builder of the graph has changed the weights of {name}: export with `form='dense'`")


def _weight(layer: Layer) -> np.ndarray:
    return layer.weight.detach().cpu().numpy()
