"""Makes what stands around an int8 product part of its node.

LayerNormalization, product                ->  LayerNorm...          if nothing else reads the normalized tokens
product, times a constant [N]              ->  product               LayerScale: folded into scale, U_scale and bias
product, plus a constant [N]               ->  product               a bias that is added apart: folded into bias
product, GELU (with erf)                   ->  ...Gelu
product, plus a value of the same shape    ->  ...Add                the residual stream
"""

import math

import numpy as np
import onnx_ir as ir

from vitoats.export.graph import constant, constant_instead, consumers, number, only_consumer, other_input, produced_by, replace
from vitoats.format.operator import DOMAIN, INT8_OPERATORS, Int8MatMul, int8_operator

OUTPUT_FACTORS = ("scale", "U_scale", "bias")  # a constant that multiplies the output multiplies these


def fuse_int8(graph: ir.Graph) -> None:
    """Fuses around every int8 product of a graph, in place."""
    for node in list(graph):
        if node.domain == DOMAIN and node.op_type in INT8_OPERATORS:
            node = _with_layer_norm(node)
            while (folded := _with_constant(node)) is not None:
                node = folded
            _with_gelu(node) or _with_residual(node)


def _operator(node: ir.Node) -> Int8MatMul:
    return INT8_OPERATORS[node.op_type]


def _attributes(node: ir.Node) -> dict[str, int | float]:
    return {name: attribute.value for name, attribute in node.attributes.items()}


def _with_layer_norm(node: ir.Node) -> ir.Node:
    """The node with the LayerNormalization before it, if there is one that nothing else reads."""
    operator = _operator(node)
    norm = produced_by(node.inputs[0], "LayerNormalization")
    if norm is None or len(norm.inputs) < 3 or any(constant(value) is None for value in norm.inputs[1:]):
        return node
    x, weight, bias = norm.inputs
    axis = norm.attributes.get_int("axis", -1)
    last = axis == -1 or (x is not None and x.shape is not None and axis == x.shape.rank() - 1)
    unread = all(not output.uses() and not output.is_graph_output() for output in norm.outputs[1:])
    if not last or not unread or consumers(norm.outputs[0]) != [node]:
        return node
    attributes = _attributes(node) | {"epsilon": norm.attributes.get_float("epsilon", 1e-5)}
    name = int8_operator(operator.weights, True, operator.suffix).name
    return replace([norm, node], name, node.name, [x, weight, bias, *node.inputs[1:]], attributes)


def _with_constant(node: ir.Node) -> ir.Node | None:
    """The node with the constant of the output's width that its output alone is multiplied by, or that is added; or None."""
    y = node.outputs[0]
    after = only_consumer(y, "Mul", "Add")
    values = None if after is None else constant(other_input(after, y))
    if after is None or values is None or y.shape is None or values.ndim > y.shape.rank():
        return None
    if values.shape[-1:] != (y.shape[-1],) or values.size != y.shape[-1]:
        return None
    values = values.reshape(-1)
    inputs = dict(zip(_operator(node).inputs, node.inputs, strict=True))
    for name in OUTPUT_FACTORS if after.op_type == "Mul" else ("bias",):
        if (old := inputs.get(name)) is not None and (before := constant(old)) is not None:
            folded = before * values if after.op_type == "Mul" else before + values
            inputs[name] = constant_instead(old, f"{node.name}.{name}", folded.astype(np.float32))
    return replace([node, after], node.op_type, node.name, list(inputs.values()), _attributes(node))


def _with_gelu(node: ir.Node) -> ir.Node | None:
    """The node with the GELU after it, in the form of ``vitoats.export.gelu``; None if there is no GELU alone."""
    y = node.outputs[0]
    readers = {after.op_type: after for after in consumers(y) if after.domain == ""}
    if len(consumers(y)) != 2 or readers.keys() != {"Div", "Mul"}:
        return None
    divided, twice = readers["Div"], readers["Mul"]
    erf = only_consumer(divided.outputs[0], "Erf")
    plus_one = None if erf is None else only_consumer(erf.outputs[0], "Add")
    half = only_consumer(twice.outputs[0], "Mul")
    if erf is None or plus_one is None or half is None or only_consumer(plus_one.outputs[0], "Mul") is not twice:
        return None
    sqrt_two, one, factor = (
        number(other_input(step, value)) for step, value in ((divided, y), (plus_one, erf.outputs[0]), (half, twice.outputs[0]))
    )
    if divided.inputs[0] is not y or sqrt_two is None or not math.isclose(sqrt_two, math.sqrt(2), rel_tol=1e-6):
        return None
    if (one, factor) != (1, 0.5):
        return None
    operator = int8_operator(_operator(node).weights, _operator(node).layer_norm, "Gelu")
    steps = [node, divided, erf, plus_one, twice, half]
    return replace(steps, operator.name, node.name, node.inputs, _attributes(node))


def _with_residual(node: ir.Node) -> ir.Node | None:
    """The node with the sum after it, if nothing is broadcast; None if there is no such sum."""
    y = node.outputs[0]
    after = only_consumer(y, "Add")
    residual = None if after is None else other_input(after, y)
    if after is None or residual is None or y.shape is None or y.shape != residual.shape or y.shape.has_unknown_dim():
        return None
    operator = int8_operator(_operator(node).weights, _operator(node).layer_norm, "Add")
    return replace([node, after], operator.name, node.name, [*node.inputs, residual], _attributes(node))
