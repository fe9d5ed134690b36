"""Accuracy of torch models and ONNX files, by the same code."""
