"""ONNX Runtime's dynamic quantization: the usual alternative to compressing the weights."""

import logging
from pathlib import Path

import onnx
from onnxruntime.quantization import QuantType, quantize_dynamic

from vitoats.common.errors import InputError


def quantize(dense: Path, int8: Path) -> None:
    """Quantizes the weights of all MatMuls to int8, with one scale per output; activations are quantized at each call."""
    model = onnx.load(str(dense))
    del model.graph.value_info[:]  # quantize_dynamic rejects the shapes of a Gemm with a transposed weight as inconsistent
    logging.disable(logging.WARNING)  # it recommends a preprocessing step that changes nothing here
    try:
        quantize_dynamic(
            model,
            int8,
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            weight_type=QuantType.QInt8,
            extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},  # behind operators whose types onnx does not know
        )
    finally:
        logging.disable(logging.NOTSET)


def classifier_input(model: onnx.ModelProto) -> str:
    """The name of the value [batch, d] that is the input of the last linear layer of a dense model.

    Raises:
        InputError: the model does not end in a linear layer.
    """
    makers = {name: node for node in model.graph.node for name in node.output}
    weights = {tensor.name for tensor in model.graph.initializer}
    node = makers.get(model.graph.output[0].name)
    if node is not None and node.op_type == "Add":  # the bias
        node = next((makers[name] for name in node.input if name in makers), None)
    if node is None or node.op_type not in ("Gemm", "MatMul") or node.input[0] in weights:
        raise InputError("the exported model does not end in a linear classifier: give it one with `head`")
    return node.input[0]


def with_output(model: onnx.ModelProto, name: str) -> onnx.ModelProto:
    """Adds a float value of a model as its second output, in place."""
    model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    return model
