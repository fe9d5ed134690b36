"""A checksum of tensors by name: it finds bytes that were changed, whatever the file around them."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of, for each tensor in the order of names: "name dtype [shape]", a newline, and its bytes in row order.

    The dtype is as torch calls it: "blocks.0.norm1.weight float32 [768]". Bytes are little-endian, as in the file.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}\n".encode())
        if tensor.numel():
            digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
