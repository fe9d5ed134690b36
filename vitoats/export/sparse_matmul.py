"""The operator ``vitoats::SparseMatMul`` and its body as an ONNX function of standard operators.

    SparseMatMul(x[..., K], values[nnz], mask[N, ceil(K/8)] uint8, bias[N], U[B, N/B, r], V[B, r, K]) -> y[..., N]

y = x (S + U V)^T + bias, with the attribute in_features = K; S [N, K] has ``values`` in row order wherever ``mask`` has a bit
(format.bitmask), and U V is a product for each of B equal parts of the rows. bias is optional, and so are U and V, together.
The function travels in the file, so that any runtime runs it; a function's inputs are not optional, so it has those that the
file's nodes have. ONNX Runtime inlines it where it knows no such operator, and since all but x are constants it folds
everything up to the transposed S + U V: it then runs one dense MatMul, at dense speed, from a small file.

The body unpacks bits, numbers them by a running sum, and gathers; no NonZero or Scatter, which would not be folded, and only
what ONNX Runtime 1.17 has kernels for (no comparison of uint8).
"""

from typing import no_type_check

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper
from onnxscript import opset18 as op
from onnxscript import script
from onnxscript.values import Opset

from vitoats.format.operator import DOMAIN, DOMAIN_VERSION, INPUTS, NAME

LOW_RANK_STEPS = ("U_like_x", "V_like_x", "UV_of_blocks", "UV", "S_plus_UV")  # what U and V are for


@no_type_check  # onnxscript's operators know no values of unknown type
@script(Opset(DOMAIN, DOMAIN_VERSION), default_opset=op)
def _body(x, values, mask, bias, U, V, in_features: int):
    powers = op.Constant(value=numpy_helper.from_array(np.array([1, 2, 4, 8, 16, 32, 64, 128], np.uint8), "powers"))
    zero = op.Constant(value=numpy_helper.from_array(np.array([0]), "zero"))
    one = op.Constant(value=numpy_helper.from_array(np.array([1]), "one"))
    minus_one = op.Constant(value=numpy_helper.from_array(np.array([-1]), "minus_one"))
    rows_by_all = op.Constant(value=numpy_helper.from_array(np.array([0, -1]), "rows_by_all"))
    axis = op.Constant(value=numpy_helper.from_array(np.array(0), "axis"))

    mask_bytes = op.Unsqueeze(mask, minus_one)  # [N, ceil(K/8), 1]
    mask_bits = op.BitwiseAnd(mask_bytes, powers)  # [N, ceil(K/8), 8]
    padded_bits = op.Reshape(mask_bits, rows_by_all)  # [N, 8 ceil(K/8)]
    k = op.Reshape(in_features, one)
    bits = op.Slice(padded_bits, zero, k, one)  # [N, K]
    kept = op.Cast(bits, to=TensorProto.BOOL)
    kept_flat = op.Reshape(kept, minus_one)  # [N K]

    ones = op.Cast(kept_flat, to=TensorProto.INT32)
    index = op.CumSum(ones, axis, exclusive=1)  # of each entry's value, where it is kept; past the end it may be for the rest
    values_like_x = op.CastLike(values, x)
    zero_like_x = op.CastLike(zero, x)
    padded_values = op.Concat(values_like_x, zero_like_x, axis=0)
    gathered = op.Gather(padded_values, index, axis=0)
    entries = op.Where(kept_flat, gathered, zero_like_x)
    shape = op.Shape(kept)
    S = op.Reshape(entries, shape)  # [N, K]

    U_like_x = op.CastLike(U, x)
    V_like_x = op.CastLike(V, x)
    UV_of_blocks = op.MatMul(U_like_x, V_like_x)  # [B, N/B, K]
    UV = op.Reshape(UV_of_blocks, shape)  # [N, K]
    S_plus_UV = op.Add(S, UV)

    transposed = op.Transpose(S_plus_UV, perm=[1, 0])
    product = op.MatMul(x, transposed)
    with_bias = op.Add(product, bias)
    return with_bias


def sparse_matmul_function(inputs: int = 3) -> onnx.FunctionProto:
    """The function with the first 3, 4 or 6 inputs; values, U and V may be float32 or float16 and are cast to the type of x."""
    whole = _body.to_function_proto()
    attribute = [node for node in whole.node if node.output[0] == "in_features"]
    nodes = attribute + [node for node in whole.node if node not in attribute]
    output = "with_bias"
    if inputs < 6:
        nodes = [node for node in nodes if node.output[0] not in LOW_RANK_STEPS]
        next(node for node in nodes if node.output[0] == "transposed").input[0] = "S"
    if inputs < 4:
        nodes, output = nodes[:-1], "product"
    for node in nodes:
        node.ClearField("name")
    opsets = list(whole.opset_import)
    return onnx.helper.make_function(DOMAIN, NAME, INPUTS[:inputs], [output], nodes, opsets, attributes=["in_features"])
