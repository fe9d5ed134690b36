"""Makes attention, from the product with qkv to the heads side by side, one QKVAttention node.

    Reshape [b, t, 3, heads, d], Transpose, q k v apart; scale; q k^T; Softmax; times v; Transpose, Reshape [b, t, heads d]

The scale may be a factor of q, of k or of their product. Attention that does more than this, or stores q, k and v in another
order, stays as it is.
"""

import logging
from collections import Counter
from dataclasses import dataclass

import onnx_ir as ir

from vitoats.export.graph import constant, layer_name, number, only_consumer, permutation, produced_by, replace
from vitoats.format.operator import ATTENTION

log = logging.getLogger("vitoats")

LAYOUT = "queries, keys and values are not stacked in the usual order"
TRANSFORMED = "queries or keys are transformed before their product, such as by rotary positions or a norm"
SCORES = "something is added to its scores, such as relative positions or a mask"


class _OtherAttentionError(Exception):
    """Attention that QKVAttention does not compute, with the reason."""


@dataclass(frozen=True)
class _Part:
    """Queries, keys or values of all heads, [b, heads, t, d], cut out of one value qkv [b, t, 3 heads d]."""

    qkv: ir.Value
    index: int
    heads: int


def fuse_attention(graph: ir.Graph, bfloat16: bool) -> None:
    """Replaces the attention of a graph, in place, and logs the reason where it cannot.

    Args:
        graph: the traced graph.
        bfloat16: whether the products may be done in bfloat16.
    """
    reasons: Counter[str] = Counter()
    fused = 0
    for node in list(graph):
        product = only_consumer(node.outputs[0], "MatMul") if (node.domain, node.op_type) == ("", "Softmax") else None
        if product is None:
            continue
        try:
            _fuse(node, product, bfloat16)
            fused += 1
        except _OtherAttentionError as error:
            reasons[str(error)] += 1
    for reason, count in reasons.items():
        log.info("%d of %d attention layers stay separate nodes: %s", count, fused + reasons.total(), reason)


def _fuse(softmax: ir.Node, product: ir.Node, bfloat16: bool) -> None:
    scores, scale = _without_factor(softmax.inputs[0])
    if softmax.attributes.get_int("axis", -1) != -1 or (multiply := produced_by(scores, "MatMul")) is None:
        raise _OtherAttentionError(SCORES)
    queries, factor_of_q = _without_factor(multiply.inputs[0])
    keys_transposed, factor_after = _without_factor(multiply.inputs[1])
    transpose = produced_by(keys_transposed, "Transpose")
    if transpose is None or permutation(transpose) != (0, 1, 3, 2):
        raise _OtherAttentionError(TRANSFORMED)
    keys, factor_before = _without_factor(transpose.inputs[0])
    q, k, v = (_part(value) for value in (queries, keys, product.inputs[1]))
    if (q.qkv, q.heads) != (k.qkv, k.heads) or q.qkv is not v.qkv or [q.index, k.index, v.index] != [0, 1, 2]:
        raise _OtherAttentionError(LAYOUT)
    by_token = only_consumer(product.outputs[0], "Transpose")
    side_by_side = None if by_token is None else only_consumer(by_token.outputs[0], "Reshape")
    if by_token is None or side_by_side is None or permutation(by_token) != (0, 2, 1, 3):
        raise _OtherAttentionError(LAYOUT)
    y, qkv = side_by_side.outputs[0], q.qkv
    if y.shape is None or qkv.shape is None or y.shape.dims != (*qkv.shape[:2], qkv.shape[2] // 3):
        raise _OtherAttentionError(LAYOUT)
    scale *= factor_of_q * factor_after * factor_before
    attributes = {"num_heads": q.heads, "scale": scale, "bfloat16": int(bfloat16)}
    replace([softmax, product, by_token, side_by_side], ATTENTION, layer_name(softmax), [qkv], attributes)


def _without_factor(value: ir.Value | None) -> tuple[ir.Value | None, float]:
    """What a value is apart from constant numbers that multiply or divide it, and their product."""
    factor = 1.0
    while (node := produced_by(value, "Mul", "Div")) is not None:
        first, second = node.inputs
        if (constant_factor := number(second)) is not None:
            value, factor = first, factor * constant_factor if node.op_type == "Mul" else factor / constant_factor
        elif node.op_type == "Mul" and (constant_factor := number(first)) is not None:
            value, factor = second, factor * constant_factor
        else:
            break
    return value, factor


def _part(value: ir.Value | None) -> _Part:
    """Traces queries, keys or values back to qkv."""
    squeeze = produced_by(value, "Squeeze")
    cut = produced_by(squeeze.inputs[0] if squeeze else value, "Slice", "Split", "Gather")
    if cut is None:
        raise _OtherAttentionError(LAYOUT if produced_by(value, "Transpose", "Reshape") else TRANSFORMED)
    transpose = produced_by(cut.inputs[0], "Transpose")
    reshape = None if transpose is None else produced_by(transpose.inputs[0], "Reshape")
    index = _index(cut, squeeze)
    if index is None or transpose is None or reshape is None or permutation(transpose) != (2, 0, 3, 1, 4):
        raise _OtherAttentionError(LAYOUT)
    qkv, split = reshape.inputs[0], reshape.outputs[0].shape
    if qkv is None or qkv.shape is None or split is None or qkv.shape.rank() != 3 or split.rank() != 5:
        raise _OtherAttentionError(LAYOUT)
    *batch_and_tokens, three, heads, width = split
    if not isinstance(heads, int) or not isinstance(width, int):
        raise _OtherAttentionError(LAYOUT)
    if batch_and_tokens != list(qkv.shape[:2]) or three != 3 or qkv.shape[2] != 3 * heads * width:
        raise _OtherAttentionError(LAYOUT)
    return _Part(qkv, index, heads)


def _index(cut: ir.Node, squeeze: ir.Node | None) -> int | None:
    """Which entry of the first axis a node cuts out, if it is exactly one and that axis is then removed."""
    if cut.op_type == "Gather":
        indices = constant(cut.inputs[1])
        if indices is None or indices.ndim > 0 or cut.attributes.get_int("axis", 0) != 0 or squeeze is not None:
            return None
        return int(indices)
    axes = constant(squeeze.inputs[1]) if squeeze is not None and len(squeeze.inputs) > 1 else None
    if axes is None or axes.tolist() != [0]:
        return None
    if cut.op_type == "Split":
        assert squeeze is not None
        first = cut.attributes.get_int("axis", 0) == 0 and len(cut.outputs) == 3
        return [value is squeeze.inputs[0] for value in cut.outputs].index(True) if first else None
    bounds = [constant(value) for value in cut.inputs[1:]]
    if len(bounds) < 3 or any(b is None or b.size != 1 for b in bounds):
        return None
    start, end, axis, *step = (int(b.reshape(())) for b in bounds if b is not None)
    return start if (end, axis, step or [1]) == (start + 1, 0, [1]) else None
