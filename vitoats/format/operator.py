"""Names of the operator in exported files, ``vitoats::SparseMatMul``, which is specified in docs/formats.md."""

DOMAIN = "vitoats"
DOMAIN_VERSION = 1
NAME = "SparseMatMul"
INPUTS = ("x", "values", "mask", "bias", "U", "V")
OPSET = 18
