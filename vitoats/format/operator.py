"""Names of the operators in exported files, which docs/formats.md specifies, and their inputs and attributes.

A function in ONNX has no optional inputs, so each combination of an int8 product with what is computed before and after it is
an operator of its own: LayerNormSparseMatMulInt8Gelu and so on.
"""

from dataclasses import dataclass

DOMAIN = "vitoats"
DOMAIN_VERSION = 1  # of files whose only operator is SparseMatMul
NEWEST_DOMAIN_VERSION = 2
OPSET = 18

NAME = "SparseMatMul"
INPUTS = ("x", "values", "mask", "bias", "U", "V")
ATTENTION = "QKVAttention"


@dataclass(frozen=True)
class Operator:
    """An operator of domain version 2.

    Attributes:
        name: its name.
        inputs: names of its inputs.
        attributes: names of its attributes.
    """

    name: str
    inputs: tuple[str, ...]
    attributes: tuple[str, ...]


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
        weights=weights,
        layer_norm=layer_norm,
        suffix=suffix,
    )


_INT8 = [_int8_matmul(weights, norm, suffix) for weights in WEIGHTS for norm in (False, True) for suffix in SUFFIXES]
INT8_OPERATORS = {operator.name: operator for operator in _INT8}
QKV_ATTENTION = Operator(ATTENTION, ("qkv",), ("num_heads", "scale", "bfloat16"))
LINEAR = (NAME, *INT8_OPERATORS)  # the operators that stand for a linear layer


def int8_operator(weights: str, layer_norm: bool, suffix: str) -> Int8MatMul:
    """The int8 operator with these properties."""
    return next(o for o in _INT8 if (o.weights, o.layer_norm, o.suffix) == (weights, layer_norm, suffix))
