"""Names of the operators in exported files, which docs/formats.md specifies, and their inputs and attributes.

A function in ONNX has no optional inputs, so each combination of an int8 product with what is computed before and after it is
an operator of its own: LayerNormSparseMatMulInt8Gelu and so on.
"""

from collections.abc import Mapping
from dataclasses import dataclass

DOMAIN = "vitoats"
DOMAIN_VERSION = 1  # of files whose only operator is SparseMatMul
NEWEST_DOMAIN_VERSION = 3
OPSET = 18

NAME = "SparseMatMul"
INPUTS = ("x", "values", "mask", "bias", "U", "V")
ATTENTION = "QKVAttention"


@dataclass(frozen=True)
class Operator:
    """An operator.

    Attributes:
        name: its name.
        inputs: names of its inputs.
        attributes: names of its attributes.
        since_version: the first version of the domain that has it.
    """

    name: str
    inputs: tuple[str, ...]
    attributes: tuple[str, ...]
    since_version: int


@dataclass(frozen=True)
class Int8MatMul(Operator):
    """y = x W^T + bias with int8 weights, and what is done before and after.

    Attributes:
        weights: "SparseMatMulInt8" or "MatMulInt8", the operator without prefix and suffix.
        layer_norm: whether x is normalized first.
        suffix: "Gelu", "Add" (of the last input, residual) or "".
    """

    weights: str
    layer_norm: bool
    suffix: str


SPARSE_INT8, DENSE_INT8 = "SparseMatMulInt8", "MatMulInt8"
WEIGHTS = {
    SPARSE_INT8: ("values", "mask", "scale", "bias", "U", "U_scale", "V", "V_scale"),
    DENSE_INT8: ("weight", "scale", "bias"),
}
LAYER_NORM = ("norm_weight", "norm_bias")
SUFFIXES = ("", "Gelu", "Add")


def _int8_matmul(weights: str, layer_norm: bool, suffix: str) -> Int8MatMul:
    return Int8MatMul(
        name=f"{'LayerNorm' if layer_norm else ''}{weights}{suffix}",
        inputs=("x", *(LAYER_NORM if layer_norm else ()), *WEIGHTS[weights], *(("residual",) if suffix == "Add" else ())),
        attributes=("in_features", *(("epsilon",) if layer_norm else ())),
        since_version=2,
        weights=weights,
        layer_norm=layer_norm,
        suffix=suffix,
    )


_INT8 = [_int8_matmul(weights, norm, suffix) for weights in WEIGHTS for norm in (False, True) for suffix in SUFFIXES]
INT8_OPERATORS = {operator.name: operator for operator in _INT8}
QKV_ATTENTION = Operator(ATTENTION, ("qkv",), ("num_heads", "scale", "bfloat16"), since_version=2)


def int8_operator(weights: str, layer_norm: bool, suffix: str) -> Int8MatMul:
    """The int8 operator with these properties."""
    return next(o for o in _INT8 if (o.weights, o.layer_norm, o.suffix) == (weights, layer_norm, suffix))


@dataclass(frozen=True)
class Stage:
    """One of the operators that a composite is made of. Its first input is x, or the output of the stage before.

    Attributes:
        operator: the operator.
        inputs: the composite's names of its other inputs.
        attributes: the composite's names of its attributes, by its own.
    """

    operator: Operator
    inputs: tuple[str, ...]
    attributes: Mapping[str, str]


@dataclass(frozen=True)
class Composite(Operator):
    """Several operators in a row as one, so that what passes between them never leaves the processor's caches.

    Attributes:
        stages: the operators.
    """

    stages: tuple[Stage, ...]


def _mlp(weights_1: str, weights_2: str) -> Composite:
    """y = x + fc2(gelu(fc1(layer_norm(x))))."""
    fc1, fc2 = int8_operator(weights_1, True, "Gelu"), int8_operator(weights_2, False, "Add")
    of_fc1, of_fc2 = (tuple(f"{name}_{i}" for i in WEIGHTS[w]) for name, w in (("fc1", weights_1), ("fc2", weights_2)))
    return Composite(
        name=fc1.name + fc2.name,
        inputs=("x", *LAYER_NORM, *of_fc1, *of_fc2),
        attributes=("in_features", "hidden_features", "epsilon"),
        since_version=3,
        stages=(
            Stage(fc1, (*LAYER_NORM, *of_fc1), {"in_features": "in_features", "epsilon": "epsilon"}),
            Stage(fc2, (*of_fc2, "x"), {"in_features": "hidden_features"}),
        ),
    )


def _block_attention(weights: str) -> Composite:
    """y = attention(qkv(layer_norm(x)))."""
    qkv = int8_operator(weights, True, "")
    return Composite(
        name=qkv.name + QKV_ATTENTION.name,
        inputs=qkv.inputs,
        attributes=(*qkv.attributes, *QKV_ATTENTION.attributes),
        since_version=3,
        stages=(
            Stage(qkv, qkv.inputs[1:], {name: name for name in qkv.attributes}),
            Stage(QKV_ATTENTION, (), {name: name for name in QKV_ATTENTION.attributes}),
        ),
    )


_COMPOSITES = [*(_mlp(first, second) for first in WEIGHTS for second in WEIGHTS), *map(_block_attention, WEIGHTS)]
COMPOSITES = {operator.name: operator for operator in _COMPOSITES}
OPERATORS: dict[str, Operator] = {**INT8_OPERATORS, ATTENTION: QKV_ATTENTION, **COMPOSITES}  # since version 2
LINEAR = (NAME, *INT8_OPERATORS, *COMPOSITES)  # the operators that stand for linear layers


def composite(first: str, second: str) -> Composite | None:
    """The operator that is these two in a row, by name; None if there is none."""
    return COMPOSITES.get(first + second)
