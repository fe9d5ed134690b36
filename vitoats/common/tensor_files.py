"""Tensors in safetensors files."""

import json
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
    _order_metadata(path)
    path.chmod(0o644)


def _order_metadata(path: Path) -> None:
    """Sorts the metadata in a file's header: the library writes it in random order."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
        if len(ordered) == length:
            file.seek(8)
            file.write(ordered)
