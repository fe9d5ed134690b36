"""Resizes the position embedding for another image size, in one of three ways.

At 224 px, DINOv2's final features differ by about 2 % between them.

official  Meta's code. Without registers: bicubic, no antialiasing, and the grid scaled by (n + 0.1) / N, an offset that
          shifts every sample slightly. With registers: bicubic with antialiasing, to the exact size.
          github.com/facebookresearch/dinov2, dinov2/models/vision_transformer.py and dinov2/hub/backbones.py
hf        transformers' Dinov2 and Dinov2WithRegisters. Like official, but to the exact size in both cases.
timm      timm's code: bicubic with antialiasing, to the exact size in both cases.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WAYS = ("official", "hf", "timm")
OFFSET = 0.1  # in Meta's code for models without registers


def resample(pos_embed: Tensor, grid: int, way: str, *, prefix: int, registers: bool) -> Tensor:
    """Resizes a square position embedding.

    Args:
        pos_embed: [1, prefix + N * N, d].
        grid: n, the number of patches along a side of the new image.
        way: one of ``WAYS``.
        prefix: number of positions that do not belong to a patch; they stay unchanged.
        registers: whether the model has register tokens.

    Returns:
        [1, prefix + n * n, d]; the input itself if n equals N.
    """
    own, patches = pos_embed[:, :prefix], pos_embed[:, prefix:]
    n = round(patches.shape[1] ** 0.5)
    if grid == n:
        return pos_embed
    patches = patches.reshape(1, n, n, -1).permute(0, 3, 1, 2).float()  # [1, d, N, N]
    antialias = registers or way == "timm"
    if way == "official" and not registers:
        scale = (grid + OFFSET) / n
        patches = F.interpolate(patches, scale_factor=(scale, scale), mode="bicubic", antialias=antialias)
    else:
        patches = F.interpolate(patches, size=(grid, grid), mode="bicubic", antialias=antialias)
    assert patches.shape[2:] == (grid, grid)
    return torch.cat([own, patches.flatten(2).transpose(1, 2).to(own.dtype)], dim=1)


def set_image_size(model: Any, img_size: int, way: str) -> None:
    """Sets the image size of a timm ViT with loaded weights, and resizes its position embedding in the given way."""
    native = model.pos_embed.detach()
    prefix = 0 if model.no_embed_class else model.num_prefix_tokens
    model.set_input_size((img_size, img_size))
    grid = model.patch_embed.grid_size[0]
    model.pos_embed = nn.Parameter(resample(native, grid, way, prefix=prefix, registers=model.reg_token is not None))
