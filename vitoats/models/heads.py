"""A linear head on the frozen features of a backbone.

Features follow DINOv2's linear evaluation: the class tokens of the last ``layers`` blocks, each after the final norm, then
the mean of the last block's patch tokens; register tokens are left out. A head is [n_classes, (layers + 1) * d]. Backbones
without class tokens have the pooled features alone (``ImageInputs.features``), and heads of 0 layers.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vitoats.common.errors import InputError
from vitoats.common.sizes import ImageSize
from vitoats.models.inputs import pooled


@dataclass(frozen=True)
class HeadInfo:
    """The backbone, images and classes that a head was trained for, according to its file.

    Attributes:
        backbone: the backbone's model name; "" if not recorded.
        img_size: image size in pixels, (height, width) if they differ; 0 if not recorded.
        layers: number of last blocks whose class tokens are used, 1 or 4; 0 for a backbone without class tokens.
        patch_mean: whether the mean of the patch tokens is appended; without it the head is [n_classes, layers * d].
        classes: class names in the order of the outputs; empty if not recorded.
    """

    backbone: str = ""
    img_size: ImageSize = 0
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
    """Class tokens of the last ``layers`` blocks, then the mean of the patch tokens: [batch, (layers + patch_mean) * d].

    ``check_class_tokens`` tells whether the backbone has that many class tokens.
    """
    if not has_class_token(backbone):
        return pooled(backbone, backbone.forward_features(x))
    if layers == 1:
        tokens = backbone.forward_features(x)
        cls, patches = [tokens[:, 0]], tokens[:, backbone.num_prefix_tokens :]
    else:
        outputs = backbone.forward_intermediates(
            x, indices=layers, return_prefix_tokens=True, norm=True, output_fmt="NLC", intermediates_only=True
        )
        cls, patches = [prefix[:, 0] for _, prefix in outputs], outputs[-1][0]
    return torch.cat([*cls, patches.mean(dim=1)] if patch_mean else cls, dim=1)


def has_class_token(backbone: Any) -> bool:
    """Whether the first of a backbone's final tokens is a class token."""
    return getattr(backbone, "num_prefix_tokens", 0) > 0


def most_layers(backbone: Any) -> int:
    """How many of the last blocks give a class token: all, or the last one alone if timm hands out no others; or none."""
    if not has_class_token(backbone):
        return 0
    handed_out = inspect.signature(backbone.forward_intermediates).parameters
    return len(backbone.blocks) if "return_prefix_tokens" in handed_out else 1


def check_class_tokens(backbone: Any, layers: int) -> None:
    """Refuses a head of ``layers`` layers for a backbone with too few class tokens, or with some where it takes none.

    Raises:
        InputError: the head does not fit.
    """
    most = most_layers(backbone)
    if not (min(1, most) <= layers <= most):
        has = f"gives class tokens of {most} layers" if most else "has no class token"
        raise InputError(
            f"this {type(backbone).__name__} {has}, and the head takes those of {layers}: "
            f"use another head, or train one with tools/train_linear_probe.py"
        )


def width(backbone: Any) -> int:
    """d, the width of a backbone's features."""
    own = backbone.num_features
    return own if has_class_token(backbone) else getattr(backbone, "head_hidden_size", own)
