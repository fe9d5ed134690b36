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

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from vitoats.format.operator import DOMAIN, INPUTS, NAME, OPSET


def sparse_matmul_function(inputs: int = 3) -> onnx.FunctionProto:
    """The function with the first 3, 4 or 6 inputs; values, U and V may be float32 or float16 and are cast to the type of x."""

    def constant(name: str, array: np.ndarray) -> onnx.NodeProto:
        return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(array, name))

    in_features = helper.make_node("Constant", [], ["in_features"])
    reference = in_features.attribute.add()
    reference.name, reference.type, reference.ref_attr_name = "value_int", onnx.AttributeProto.INT, "in_features"
    nodes = [
        in_features,
        constant("powers", np.array([1, 2, 4, 8, 16, 32, 64, 128], np.uint8)),
        constant("zero", np.array([0], np.int64)),
        constant("one", np.array([1], np.int64)),
        constant("minus_one", np.array([-1], np.int64)),
        constant("rows_by_all", np.array([0, -1], np.int64)),
        constant("axis", np.array(0, np.int64)),
        helper.make_node("Unsqueeze", ["mask", "minus_one"], ["mask_bytes"]),  # [N, ceil(K/8), 1]
        helper.make_node("BitwiseAnd", ["mask_bytes", "powers"], ["mask_bits"]),  # [N, ceil(K/8), 8]
        helper.make_node("Reshape", ["mask_bits", "rows_by_all"], ["padded_bits"]),  # [N, 8 ceil(K/8)]
        helper.make_node("Reshape", ["in_features", "one"], ["k"]),
        helper.make_node("Slice", ["padded_bits", "zero", "k", "one"], ["bits"]),  # [N, K]
        helper.make_node("Cast", ["bits"], ["kept"], to=TensorProto.BOOL),
        helper.make_node("Reshape", ["kept", "minus_one"], ["kept_flat"]),  # [N K]
        helper.make_node("Cast", ["kept_flat"], ["ones"], to=TensorProto.INT32),
        helper.make_node("CumSum", ["ones", "axis"], ["index"], exclusive=1),  # of each entry's value, where it is kept
        helper.make_node("CastLike", ["values", "x"], ["values_like_x"]),
        helper.make_node("CastLike", ["zero", "x"], ["zero_like_x"]),
        helper.make_node(
            "Concat", ["values_like_x", "zero_like_x"], ["padded_values"], axis=0
        ),  # dropped entries may index past the end
        helper.make_node("Gather", ["padded_values", "index"], ["gathered"], axis=0),
        helper.make_node("Where", ["kept_flat", "gathered", "zero_like_x"], ["entries"]),
        helper.make_node("Shape", ["kept"], ["shape"]),
        helper.make_node("Reshape", ["entries", "shape"], ["S"]),  # [N, K]
    ]
    weight, y = "S", "product"
    if inputs > 4:
        weight = "S_plus_UV"
        nodes += [
            helper.make_node("CastLike", ["U", "x"], ["U_like_x"]),
            helper.make_node("CastLike", ["V", "x"], ["V_like_x"]),
            helper.make_node("MatMul", ["U_like_x", "V_like_x"], ["UV_of_parts"]),  # [B, N/B, K]
            helper.make_node("Reshape", ["UV_of_parts", "shape"], ["UV"]),  # [N, K]
            helper.make_node("Add", ["S", "UV"], [weight]),
        ]
    nodes += [
        helper.make_node("Transpose", [weight], ["transposed"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "transposed"], [y]),
    ]
    if inputs > 3:
        y = "with_bias"
        nodes.append(helper.make_node("Add", ["product", "bias"], [y]))
    return helper.make_function(
        DOMAIN,
        NAME,
        list(INPUTS[:inputs]),
        [y],
        nodes,
        [helper.make_opsetid("", OPSET)],
        attributes=["in_features"],
    )
