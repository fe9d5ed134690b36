"""The operator of exported files by name: ``vitoats::SparseMatMul``. docs/formats.md says what it does."""

DOMAIN = "vitoats"
DOMAIN_VERSION = 1
NAME = "SparseMatMul"
INPUTS = ("x", "values", "mask", "bias", "U", "V")
OPSET = 18
