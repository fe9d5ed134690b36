"""Running exported models in ONNX Runtime; needs numpy and onnxruntime only."""
