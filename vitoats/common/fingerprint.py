"""Digests of settings and weights. Files kept on disk are reused only if their digests match."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def fingerprint(weights: Mapping[str, Tensor], settings: Mapping[str, Any]) -> str:
    """A digest that identifies a run by all weights of its model and by its settings, plain values for JSON."""
    return json_sha256([settings, tensors_sha256(weights)])


def json_sha256(values: Any) -> str:
    """SHA-256 of plain values as JSON, with the keys of each object sorted."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over all tensors, sorted by name: "name dtype [shape]", a newline, and the bytes in row-major order for each.

    The dtype is torch's name for it: "blocks.0.norm1.weight float32 [768]". Bytes are little-endian, as in the file.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}\n".encode())
        flat = tensor.as_strided((tensor.numel(),), (1,))  # one that is empty or expanded may have any stride
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
