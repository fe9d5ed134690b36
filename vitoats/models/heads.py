"""A linear head on the frozen features of a backbone.

Features follow DINOv2's linear evaluation: the class tokens of the last ``layers`` blocks, each after the final norm, then
the mean of the last block's patch tokens; register tokens are left out. A head is [n_classes, (layers + 1) * d].
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vitoats.common.errors import InputError


@dataclass(frozen=True)
class HeadInfo:
    """The backbone, images and classes that a head was trained for, according to its file.

    Attributes:
        backbone: the backbone's model name; "" if not recorded.
        img_size: image size in pixels; 0 if not recorded.
        layers: number of last blocks whose class tokens are used, 1 or 4.
        patch_mean: whether the mean of the patch tokens is appended; without it the head is [n_classes, layers * d].
        classes: class names in the order of the outputs; empty if not recorded.
    """

    backbone: str = ""
    img_size: int = 0
    layers: int = 1
    classes: tuple[str, ...] = ()
    patch_mean: bool = True

    @property
    def tokens(self) -> int:
        """Number of vectors of the backbone's width that the head takes."""
        return self.layers + self.patch_mean


class LinearHeadClassifier(nn.Module):
    """A timm backbone with a linear head: images [batch, 3, h, w] to logits [batch, n_classes]."""

    def __init__(self, backbone: Any, weight: Tensor, bias: Tensor, info: HeadInfo):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(weight.shape[1], weight.shape[0])
        self.head.weight.data.copy_(weight)
        self.head.bias.data.copy_(bias)
        self.info = info

    def forward(self, x: Tensor) -> Tensor:
        return self.head(features(self.backbone, x, self.info.layers, self.info.patch_mean))


def features(backbone: Any, x: Tensor, layers: int = 1, patch_mean: bool = True) -> Tensor:
    """Class tokens of the last ``layers`` blocks, then the mean of the patch tokens: [batch, (layers + patch_mean) * d]."""
    check_class_token(backbone)
    if layers == 1:
        tokens = backbone.forward_features(x)
        cls, patches = [tokens[:, 0]], tokens[:, backbone.num_prefix_tokens :]
    else:
        outputs = backbone.get_intermediate_layers(x, n=layers, return_prefix_tokens=True, norm=True)
        cls, patches = [prefix[:, 0] for _, prefix in outputs], outputs[-1][0]
    return torch.cat([*cls, patches.mean(dim=1)] if patch_mean else cls, dim=1)


def check_class_token(backbone: Any) -> None:
    """Raises InputError for a backbone without a class token."""
    if not getattr(backbone, "num_prefix_tokens", 0):
        raise InputError(
            f"{type(backbone).__name__} has no class token here, which a linear head takes: use a ViT with one, such as DINOv2"
        )
