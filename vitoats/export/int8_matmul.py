"""The bodies of the int8 operators as ONNX functions of standard operators, made of shared pieces.

    [LayerNorm](Sparse)MatMulInt8[Gelu | Add]          vitoats.format.operator has the inputs of each

x is normalized first; W = scale * S + (U_scale * U) (V_scale * V), or W = scale * weight, all untiled
(``vitoats.format.tiles``); y = x W^T + bias; then GELU, or the sum with residual. Activations are not quantized, so a body is
slightly more exact than the native operator. W is computed in float32, the product in the type of x, so that tools can convert
a model to float16.

As in ``vitoats.export.sparse_matmul``, all inputs except x and residual are constants, so ONNX Runtime folds everything up to
the transposed W and runs one dense MatMul. The pieces use only what ONNX Runtime 1.17 has kernels for (no Where of int8), and
write GELU in the form that it fuses.
"""

import math
from collections.abc import Mapping
from typing import Any, no_type_check

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper
from onnxscript import opset18 as op
from onnxscript import script

from vitoats.format.operator import DOMAIN, OPSET, SPARSE_INT8, Int8MatMul

MINUS_ONE = numpy_helper.from_array(np.array([-1]), "minus_one")
ZERO, ONE, TWO = (numpy_helper.from_array(np.array([value]), "number") for value in (0, 1, 2))
KEEP_TWO = numpy_helper.from_array(np.array([0, 0, -1]), "keep_two")
POWERS = numpy_helper.from_array(np.array([1, 2, 4, 8, 16, 32, 64, 128], np.uint8), "powers")
TILES = numpy_helper.from_array(np.array([0, 0, 16, 4]), "tiles")
AXIS = numpy_helper.from_array(np.array(0), "axis")
SQRT_TWO, ONE_FLOAT, HALF = (numpy_helper.from_array(np.array(v, np.float32), "number") for v in (math.sqrt(2), 1, 0.5))


@no_type_check  # onnxscript's operators do not accept values of unknown type
@script(default_opset=op)
def _layer_norm(x, norm_weight, norm_bias, epsilon: float):
    normalized = op.LayerNormalization(x, norm_weight, norm_bias, axis=-1, epsilon=epsilon)
    return normalized


@no_type_check
@script(default_opset=op)
def _columns(in_features: int):
    one = op.Constant(value=ONE)
    columns = op.Reshape(in_features, one)
    return columns


@no_type_check
@script(default_opset=op)
def _tiles(values, mask):
    """values and mask as int8 weights are stored without zeros: [strips, quads, 16, 4], but float32."""
    zero = op.Constant(value=ZERO)
    minus_one = op.Constant(value=MINUS_ONE)
    mask_bytes = op.Unsqueeze(mask, minus_one)  # [strips, quads, 8, 1]
    powers = op.Constant(value=POWERS)
    mask_bits = op.BitwiseAnd(mask_bytes, powers)  # [strips, quads, 8, 8]
    tiles_shape = op.Constant(value=TILES)
    bits = op.Reshape(mask_bits, tiles_shape)
    kept = op.Cast(bits, to=TensorProto.BOOL)
    kept_flat = op.Reshape(kept, minus_one)

    ones = op.Cast(kept_flat, to=TensorProto.INT32)
    axis = op.Constant(value=AXIS)
    index = op.CumSum(ones, axis, exclusive=1)  # of a kept entry's value; may be past the end for others
    no_value = op.Cast(zero, to=TensorProto.FLOAT)
    values_as_float = op.Cast(values, to=TensorProto.FLOAT)
    padded_values = op.Concat(values_as_float, no_value, axis=0)
    gathered = op.Gather(padded_values, index, axis=0)
    entries = op.Where(kept_flat, gathered, no_value)
    shape = op.Shape(kept)
    tiles = op.Reshape(entries, shape)
    return tiles


@no_type_check
@script(default_opset=op)
def _untiled(tiles, columns):
    """Tiles [..., quads, 16, 4] as a float32 matrix with 16 rows for each strip and the given number of columns."""
    minus_one = op.Constant(value=MINUS_ONE)
    zero = op.Constant(value=ZERO)
    two = op.Constant(value=TWO)
    tiles_as_float = op.Cast(tiles, to=TensorProto.FLOAT)
    strip_shape = op.Shape(tiles, start=-3)
    strips_shape = op.Concat(minus_one, strip_shape, axis=0)
    strips = op.Reshape(tiles_as_float, strips_shape)  # [strips, quads, 16, 4]
    rows_of_quads = op.Transpose(strips, perm=[0, 2, 1, 3])
    keep_two = op.Constant(value=KEEP_TWO)
    rows = op.Reshape(rows_of_quads, keep_two)  # [strips, 16, 4 quads]
    cut_rows = op.Slice(rows, zero, columns, two)
    matrix_shape = op.Concat(minus_one, columns, axis=0)
    matrix = op.Reshape(cut_rows, matrix_shape)
    return matrix


@no_type_check
@script(default_opset=op)
def _scaled(padded, scale):
    """The first rows of a matrix, as many as there are scales, times their scales."""
    zero = op.Constant(value=ZERO)
    minus_one = op.Constant(value=MINUS_ONE)
    rows = op.Shape(scale)
    matrix = op.Slice(padded, zero, rows, zero)
    scale_as_float = op.Cast(scale, to=TensorProto.FLOAT)
    factors = op.Unsqueeze(scale_as_float, minus_one)
    scaled = op.Mul(matrix, factors)
    return scaled


@no_type_check
@script(default_opset=op)
def _rank(V_scale):
    rank = op.Shape(V_scale, start=1)
    return rank


@no_type_check
@script(default_opset=op)
def _with_low_rank(S, U, V, V_scale):
    """S + U V from U [N, r] and V [parts (r and padding), K]."""
    zero = op.Constant(value=ZERO)
    one = op.Constant(value=ONE)
    minus_one = op.Constant(value=MINUS_ONE)
    parts = op.Shape(V_scale, end=1)
    rank = op.Shape(V_scale, start=1)
    columns = op.Shape(V, start=1)
    V_shape = op.Concat(parts, minus_one, columns, axis=0)
    V_of_strips = op.Reshape(V, V_shape)
    V_int8 = op.Slice(V_of_strips, zero, rank, one)  # [parts, r, K]
    V_scale_as_float = op.Cast(V_scale, to=TensorProto.FLOAT)
    V_factors = op.Unsqueeze(V_scale_as_float, minus_one)
    V_of_parts = op.Mul(V_int8, V_factors)
    U_shape = op.Concat(parts, minus_one, rank, axis=0)
    U_of_parts = op.Reshape(U, U_shape)  # [parts, N / parts, r]
    UV_of_parts = op.MatMul(U_of_parts, V_of_parts)
    shape = op.Shape(S)
    UV = op.Reshape(UV_of_parts, shape)
    W = op.Add(S, UV)
    return W


@no_type_check
@script(default_opset=op)
def _product(x, W, bias):
    transposed = op.Transpose(W, perm=[1, 0])
    weight_like_x = op.CastLike(transposed, x)
    product = op.MatMul(x, weight_like_x)
    y = op.Add(product, bias)
    return y


@no_type_check
@script(default_opset=op)
def _gelu(y):
    sqrt_two_as_float = op.Constant(value=SQRT_TWO)
    one_as_float = op.Constant(value=ONE_FLOAT)
    half_as_float = op.Constant(value=HALF)
    sqrt_two = op.CastLike(sqrt_two_as_float, y)
    one = op.CastLike(one_as_float, y)
    half = op.CastLike(half_as_float, y)
    scaled = op.Div(y, sqrt_two)
    erf = op.Erf(scaled)
    one_plus_erf = op.Add(erf, one)
    twice = op.Mul(y, one_plus_erf)
    gelu = op.Mul(twice, half)
    return gelu


@no_type_check
@script(default_opset=op)
def _add(y, residual):
    total = op.Add(y, residual)
    return total


def int8_matmul_function(operator: Int8MatMul) -> onnx.FunctionProto:
    """The body of an int8 operator."""
    nodes = [*_nodes(_columns, "K")]
    x = "x"
    if operator.layer_norm:
        nodes += _nodes(_layer_norm, "normalized", x="x", norm_weight="norm_weight", norm_bias="norm_bias")
        x = "normalized"
    tiles = "weight"
    if operator.weights == SPARSE_INT8:
        nodes += _nodes(_tiles, "S.tiles", values="values", mask="mask")
        tiles = "S.tiles"
    nodes += _nodes(_untiled, "S.padded", tiles=tiles, columns="K")
    nodes += _nodes(_scaled, "W", padded="S.padded", scale="scale")
    W = "W"
    if operator.weights == SPARSE_INT8:
        nodes += _nodes(_rank, "rank", V_scale="V_scale")
        nodes += _nodes(_untiled, "U.padded", tiles="U", columns="rank")
        nodes += _nodes(_scaled, "U.scaled", padded="U.padded", scale="U_scale")
        nodes += _nodes(_untiled, "V.padded", tiles="V", columns="K")
        nodes += _nodes(_with_low_rank, "W.whole", S="W", U="U.scaled", V="V.padded", V_scale="V_scale")
        W = "W.whole"
    nodes += _nodes(_product, "y", x=x, W=W, bias="bias")
    output = "y"
    if operator.suffix == "Gelu":
        nodes += _nodes(_gelu, "gelu", y="y")
        output = "gelu"
    elif operator.suffix == "Add":
        nodes += _nodes(_add, "total", y="y", residual="residual")
        output = "total"
    opsets = [onnx.helper.make_opsetid("", OPSET)]
    return onnx.helper.make_function(
        DOMAIN, operator.name, operator.inputs, [output], nodes, opsets, attributes=list(operator.attributes)
    )


def _nodes(piece: Any, output: str, **inputs: str) -> list[onnx.NodeProto]:
    """The nodes of a piece that read and write values of these names; names of values inside it begin with ``output``."""
    proto = piece.to_function_proto()
    names: Mapping[str, str] = {**inputs, proto.output[0]: output}
    for node in proto.node:
        node.ClearField("name")
        for values in (node.input, node.output):
            values[:] = [names.get(name, f"{output}.{name}") for name in values]
    return list(proto.node)
