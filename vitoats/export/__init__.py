"""Export to ONNX, one rule a file: the operator's function body, the layer in exported form, the whole file."""
