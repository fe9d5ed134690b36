"""A model's size in parameters, non-zeros and bytes, with the definition of each."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vitoats.format import factored

DEFINITIONS = {
    "parameters": "numbers the model keeps: of a compressed layer nnz(S), U, V and bias, of all others every entry",
    "non-zeros": "those of them that are not zero",
    "bytes": "of all tensors in model.safetensors, bit masks included, its header left out",
}
COUNTED = ("parameters", "nonzeros", "bytes")  # the fields of Counts, in the order of DEFINITIONS


@dataclass(frozen=True)
class Counts:
    """A model's size, as defined in ``DEFINITIONS``."""

    parameters: int
    nonzeros: int
    bytes: int


def count(tensors: Mapping[str, Tensor], not_parameters: set[str]) -> Counts:
    """Counts a model's tensors as stored in a file.

    Args:
        tensors: tensors by name; compressed layers as in ``format.factored``.
        not_parameters: names of buffers (such as a batch norm's running mean). Like bit masks and the scales of int8 weights,
            they only count as bytes.
    """
    parameters, nonzeros, n_bytes = 0, 0, 0
    for name, tensor in tensors.items():
        n_bytes += tensor.nbytes
        if name not in not_parameters and not factored.BESIDE.fullmatch(name):
            parameters += tensor.numel()
            nonzeros += int(torch.count_nonzero(tensor))
    return Counts(parameters, nonzeros, n_bytes)
