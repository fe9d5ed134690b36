"""Resizes the position embedding for another image size, in one of three ways; or for every image, in timm's.

At 224 px, DINOv2's final features differ by about 2 % between them.

official  Meta's code. Without registers: bicubic, no antialiasing, and the grid scaled by (n + 0.1) / N, an offset that
          shifts every sample slightly. With registers: bicubic with antialiasing, to the exact size.
          github.com/facebookresearch/dinov2, dinov2/models/vision_transformer.py and dinov2/hub/backbones.py
hf        transformers' Dinov2 and Dinov2WithRegisters. Like official, but to the exact size in both cases.
timm      timm's code: bicubic with antialiasing, to the exact size in both cases.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vitoats.common.torchvision_ops  # noqa: F401  (before timm)
from vitoats.common.errors import InputError
from vitoats.common.sizes import ImageSize, sides

from timm.layers.format import Format  # isort: skip

WAYS = ("official", "hf", "timm")
OFFSET = 0.1  # in Meta's code for models without registers


def resample(
    pos_embed: Tensor, before: tuple[int, int], grid: tuple[int, int], way: str, *, prefix: int, registers: bool
) -> Tensor:
    """Resizes a position embedding.

    Args:
        pos_embed: [1, prefix + H * W, d].
        before: H and W, the number of patches along the sides of the image that it is for.
        grid: h and w, the number of patches along the sides of the new image.
        way: one of ``WAYS``.
        prefix: number of positions that do not belong to a patch; they stay unchanged.
        registers: whether the model has register tokens.

    Returns:
        [1, prefix + h * w, d]; the input itself if both grids are the same.
    """
    if grid == before:
        return pos_embed
    own, patches = pos_embed[:, :prefix], pos_embed[:, prefix:]
    patches = patches.reshape(1, *before, -1).permute(0, 3, 1, 2).float()  # [1, d, H, W]
    antialias = registers or way == "timm"
    if way == "official" and not registers:
        scale = tuple((new + OFFSET) / old for new, old in zip(grid, before, strict=True))
        patches = F.interpolate(patches, scale_factor=scale, mode="bicubic", antialias=antialias)
    else:
        patches = F.interpolate(patches, size=grid, mode="bicubic", antialias=antialias)
    assert patches.shape[2:] == grid
    return torch.cat([own, patches.flatten(2).transpose(1, 2).to(own.dtype)], dim=1)


def set_image_size(model: Any, img_size: ImageSize, way: str) -> bool:
    """Sets the image size of a timm ViT with loaded weights, and resizes its position embedding in the given way.

    Returns:
        whether the position embedding was resized.
    """
    native, before = model.pos_embed.detach(), model.patch_embed.grid_size
    prefix = 0 if model.no_embed_class else model.num_prefix_tokens
    model.set_input_size(sides(img_size))
    grid = model.patch_embed.grid_size
    model.pos_embed = nn.Parameter(resample(native, before, grid, way, prefix=prefix, registers=model.reg_token is not None))
    return grid != before


def free_image_size(model: Any) -> int:
    """Makes a timm ViT interpolate its positions, in timm's way, to whatever size an image has.

    Returns:
        what height and width must be multiples of.

    Raises:
        InputError: timm's code for this model has no such way.
    """
    kind = type(model).__name__
    if not hasattr(model, "dynamic_img_size") or not hasattr(model, "_pos_embed"):
        raise InputError(f"a {kind} takes images of one size only: export a file for each size (`img_size`)")
    patches = model.patch_embed
    height, width = patches.patch_size
    if not model.dynamic_img_size:
        if getattr(model, "rope", None) is not None:
            raise InputError(f"this {kind} has rotary positions of one size: load it with `model_kwargs` dynamic_img_size=True")
        model.dynamic_img_size = True
        patches.strict_img_size, patches.flatten, patches.output_fmt = False, False, Format.NHWC
    return math.lcm(height, width)
