"""Digests of settings and of weights. What is kept on disk is used again only where they are the same."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def fingerprint(model: nn.Module, settings: Mapping[str, Any]) -> str:
    """Identifies a run: by all weights of its model and by its settings, plain values for JSON."""
    return json_sha256([settings, tensors_sha256(model.state_dict())])


def json_sha256(values: Any) -> str:
    """SHA-256 of plain values as JSON, with the keys of each object in order."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of, for each tensor in the order of names: "name dtype [shape]", a newline, and its bytes in row order.

    The dtype is as torch calls it: "blocks.0.norm1.weight float32 [768]". Bytes are little-endian, as in the file.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}\n".encode())
        flat = tensor.as_strided((tensor.numel(),), (1,))  # one that is empty or expanded may have any stride
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
