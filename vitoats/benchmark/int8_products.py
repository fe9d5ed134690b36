"""Products with the native int8 operators: their models, and what they have to give, in float64."""

import copy
from collections.abc import Iterator

import numpy as np
import onnx
import torch

from vitoats.benchmark.onnx_models import product_model
from vitoats.benchmark.products import Product
from vitoats.export.int8_layers import ExportedInt8Layer, Int8Layer
from vitoats.format.int8_layers import Int8Linear, Int8SparseLowRankLinear, to_int8
from vitoats.format.layers import SparseLowRankLinear
from vitoats.format.operator import DOMAIN, NEWEST_DOMAIN_VERSION

TOLERANCE = 2e-3  # a tie in the inner activations z that is rounded the other way; without quantized activations it is more


def dense_layer(W: np.ndarray) -> Int8Linear:
    """W [n, k] in int8, without a bias."""
    linear = torch.nn.Linear(W.shape[1], W.shape[0], bias=False)
    linear.weight.data = torch.from_numpy(W)
    return to_int8(linear)  # type: ignore[return-value]


def sparse_layer(S: np.ndarray, low_rank: tuple[np.ndarray, np.ndarray] | None = None) -> Int8SparseLowRankLinear:
    """S [n, k] with explicit zeros, and U [parts, n / parts, r] and V [parts, r, k], in int8, without a bias."""
    n, k = S.shape
    U, V = low_rank or (np.zeros((1, n, 0), np.float32), np.zeros((1, 0, k), np.float32))
    of_parts = [torch.from_numpy(u) for u in U], [torch.from_numpy(v) for v in V]
    return to_int8(SparseLowRankLinear(torch.from_numpy(S), *of_parts))  # type: ignore[return-value]


def int8_product(layer: Int8Layer, x: np.ndarray, copies: int) -> Product:
    """The product of x [images, tokens, k] with a layer's weights, as MatMulInt8 or SparseMatMulInt8."""
    return Product(int8_layer_model(layer, copies), copies, expected(layer, x), TOLERANCE)


def int8_layer_model(layer: Int8Layer, copies: int) -> onnx.ModelProto:
    """A model that computes a layer ``copies`` times, each time with other weights (``vitoats.benchmark.onnx_models``)."""
    with torch.no_grad():
        exported = [ExportedInt8Layer(moved) for moved in _moved(layer, copies)]

    def constants(i: int) -> dict[str, np.ndarray]:
        return {name: getattr(exported[i], name).detach().numpy() for name in exported[i].operator.inputs[1:]}

    n, k = layer.out_features, layer.in_features
    operator = (DOMAIN, exported[0].operator.name)
    return product_model((n, k), copies, operator, constants, NEWEST_DOMAIN_VERSION, in_features=k)


def expected(layer: Int8Layer, x: np.ndarray) -> np.ndarray:
    """The outputs [n] of the first token of x: activations quantized as in the operator, and the rest in float64."""
    with torch.inference_mode():
        return copy.deepcopy(layer).double()(torch.from_numpy(x[0, 0]).double()).numpy()


def _moved(layer: Int8Layer, copies: int) -> Iterator[Int8Layer]:
    """The layer, and others whose rows of S and U, and columns of V, are in another order."""
    for i in range(copies):
        if isinstance(layer, Int8Linear):
            yield Int8Linear((layer.weight_int8.roll(i, 0), layer.weight_scale.roll(i)))
        else:
            yield Int8SparseLowRankLinear(
                (layer.S_int8.roll(i, 0), layer.S_scale.roll(i)),
                [(u.roll(i, 0), scale.roll(i)) for u, scale in zip(layer.U_int8, layer.U_scale, strict=True)],
                [(v.roll(i, 1), scale.data) for v, scale in zip(layer.V_int8, layer.V_scale, strict=True)],
            )
