"""Export to ONNX: the operator's function body, the exported form of a layer, the whole file."""
