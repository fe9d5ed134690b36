"""Weights in a file of their own beside the model, as ONNX has it for models of more than 2 GB."""

from pathlib import Path

import onnx_ir as ir

from vitoats.common.files import atomic_write
from vitoats.runtime.inference import data_file

LARGEST_FILE = 2**31 - 2**24  # bytes of weights; protobuf's limit is 2^31 - 1 for everything
SMALLEST_TENSOR = 1024  # bytes; smaller ones stay in the model, as tools look at them for shapes


def weight_bytes(model: ir.Model) -> int:
    """Size of a model's constants in bytes."""
    return sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)


def move_weights(model: ir.Model, path: Path) -> None:
    """Writes the weights of a model to the data file of ``path``; the model, in place, then refers to them there.

    Small ones become part of the model, wherever they are. A model that is already at ``path`` is removed first, as it may
    refer to the data file that is replaced.

    Raises:
        RunError: the file cannot be written.
    """
    data = data_file(path)
    large = {}
    for value in model.graph.initializers.values():
        if value.const_value is not None and value.const_value.nbytes > SMALLEST_TENSOR:
            large[value] = value.const_value
        elif isinstance(value.const_value, ir.ExternalTensor):
            (value.const_value,) = ir.external_data.convert_tensors_from_external([value.const_value])
    with atomic_write(data) as partial:
        stored = ir.external_data.convert_tensors_to_external(list(large.values()), partial.parent, partial.name)
        if data.exists():
            path.unlink(missing_ok=True)
    for value, tensor in zip(large, stored, strict=True):
        value.const_value = ir.ExternalTensor(
            data.name, tensor.offset, tensor.length, tensor.dtype, shape=tensor.shape, name=tensor.name, base_dir=data.parent
        )
