"""Tensors in safetensors files."""

from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes a safetensors file that all users may read (the library creates it readable by its owner only).

    Raises:
        OSError: the file cannot be written.
    """
    try:
        safetensors.torch.save_file(dict(tensors), str(path), metadata=metadata)
    except safetensors.SafetensorError as error:
        raise OSError(str(error)) from None
    path.chmod(0o644)
