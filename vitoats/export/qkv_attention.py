"""The operator ``vitoats::QKVAttention`` and its body as an ONNX function of standard operators.

    QKVAttention(qkv[batch, tokens, 3 heads d]) -> y[batch, tokens, heads d]

softmax(scale q k^T) v for each head. The columns of qkv are q, k and v, each with the columns of all heads side by side. The
attributes are num_heads, scale, and bfloat16, which allows the native operator to multiply in bfloat16. The body multiplies in
the type of qkv and is written so that ONNX Runtime makes the scale part of the product.
"""

from typing import no_type_check

import numpy as np
import onnx
from onnx import numpy_helper
from onnxscript import opset18 as op
from onnxscript import script

from vitoats.format.operator import DOMAIN, OPSET, QKV_ATTENTION

KEEP_TWO_AND_THREE = numpy_helper.from_array(np.array([0, 0, 3]), "kept")
KEEP_TWO = numpy_helper.from_array(np.array([0, 0, -1]), "kept")
SHAPE_STEPS = ("num_heads", "heads", "kept", "parts_shape")  # of the body, which compute the shape of the parts
ZERO, ONE, MINUS_ONE = (numpy_helper.from_array(np.array([value]), "number") for value in (0, 1, -1))


@no_type_check  # onnxscript's operators do not accept values of unknown type
@script(default_opset=op)
def _body(qkv, num_heads: int, scale: float):
    one = op.Constant(value=ONE)
    minus_one = op.Constant(value=MINUS_ONE)
    zero = op.Constant(value=ZERO)
    heads = op.Reshape(num_heads, one)
    kept = op.Constant(value=KEEP_TWO_AND_THREE)
    parts_shape = op.Concat(kept, heads, minus_one, axis=0)
    columns_of_parts = op.Reshape(qkv, parts_shape)  # [batch, tokens, 3, heads, d]
    parts = op.Transpose(columns_of_parts, perm=[2, 0, 3, 1, 4])
    q_part, k_part, v_part = op.Split(parts, axis=0, num_outputs=3)
    q = op.Squeeze(q_part, zero)  # [batch, heads, tokens, d]
    k = op.Squeeze(k_part, zero)
    v = op.Squeeze(v_part, zero)
    scale_number = op.Constant(value_float=scale)
    factor = op.CastLike(scale_number, q)
    q_scaled = op.Mul(q, factor)
    k_transposed = op.Transpose(k, perm=[0, 1, 3, 2])
    scores = op.MatMul(q_scaled, k_transposed)
    weights = op.Softmax(scores, axis=-1)
    of_heads = op.MatMul(weights, v)
    of_tokens = op.Transpose(of_heads, perm=[0, 2, 1, 3])
    y_shape = op.Constant(value=KEEP_TWO)
    y = op.Reshape(of_tokens, y_shape)
    return y


def qkv_attention_function(head_width: int | None = None) -> onnx.FunctionProto:
    """The body of QKVAttention.

    Args:
        head_width: d, if it is the same in all nodes of a file. The shape of the parts is then a constant, and other tools can
            infer the shape of y, which they do not from attributes.
    """
    nodes = list(_body.to_function_proto().node)
    if head_width is not None:
        shape = numpy_helper.from_array(np.array([0, 0, 3, -1, head_width]), "parts_shape")
        constant = onnx.helper.make_node("Constant", [], ["parts_shape"], value=shape)
        first = next(i for i, node in enumerate(nodes) if node.output[0] == "columns_of_parts")
        nodes = [constant, *(node for node in nodes[:first] if node.output[0] not in SHAPE_STEPS), *nodes[first:]]
    for node in nodes:
        node.ClearField("name")
    opsets = [onnx.helper.make_opsetid("", OPSET)]
    attributes = list(QKV_ATTENTION.attributes)
    return onnx.helper.make_function(DOMAIN, QKV_ATTENTION.name, QKV_ATTENTION.inputs, ["y"], nodes, opsets, attributes)
