"""Writing tensors to a file."""

from pathlib import Path

import safetensors.torch
from torch import Tensor


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes a safetensors file that others may read as well (the library makes it private to its owner)."""
    safetensors.torch.save_file(tensors, str(path), metadata=metadata)
    path.chmod(0o644)
