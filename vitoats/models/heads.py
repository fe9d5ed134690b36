"""Linear heads on frozen features: a file of its own, and the module that puts it on a backbone.

Features follow DINOv2's linear evaluation: the class token of the last ``layers`` blocks, each after the final norm, then
the mean of the last block's patch tokens; register tokens are left out. A head [n_classes, (layers + 1) * d] is a
safetensors file with ``weight`` and ``bias`` (ours also says in its metadata what it was made for), or one of Meta's
``dinov2_*_linear_head.pth`` files.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from vitoats.errors import InputError
from vitoats.files import save_tensors
from vitoats.models.weights import read_weights


@dataclass(frozen=True)
class HeadInfo:
    """What a head was made for, as its file says it.

    Attributes:
        backbone: the backbone's model name, "" where the file does not say.
        img_size: in pixels, 0 where the file does not say.
        layers: how many blocks give their class token, 1 or 4.
        classes: class names in the order of the outputs, empty where the file does not say.
    """

    backbone: str = ""
    img_size: int = 0
    layers: int = 1
    classes: tuple[str, ...] = ()


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
        return self.head(features(self.backbone, x, self.info.layers))


def features(backbone: Any, x: Tensor, layers: int = 1) -> Tensor:
    """[class tokens of the last ``layers`` blocks, mean of the last patch tokens], [batch, (layers + 1) * d]."""
    _check_class_token(backbone)
    if layers == 1:
        tokens = backbone.forward_features(x)
        cls, patches = [tokens[:, 0]], tokens[:, backbone.num_prefix_tokens :]
    else:
        outputs = backbone.get_intermediate_layers(x, n=layers, return_prefix_tokens=True, norm=True)
        cls, patches = [prefix[:, 0] for _, prefix in outputs], outputs[-1][0]
    return torch.cat([*cls, patches.mean(dim=1)], dim=1)


def _check_class_token(backbone: Any) -> None:
    if not getattr(backbone, "num_prefix_tokens", 0):
        raise InputError(
            f"{type(backbone).__name__} has no class token here, which a linear head takes: use a ViT with one, such as DINOv2"
        )


def save_head(path: Path, weight: Tensor, bias: Tensor, info: HeadInfo) -> None:
    """Writes a head file."""
    tensors = {"weight": weight.contiguous(), "bias": bias.contiguous()}
    save_tensors(path, tensors, {"vitoats_head": json.dumps(asdict(info))})


def load_head(path: Path, layers: int | None = None) -> tuple[Tensor, Tensor, HeadInfo]:
    """Reads a head file.

    Args:
        path: ours (.safetensors) or Meta's (.pth); a pickle is read as plain tensors only.
        layers: for a file that does not say how many layers it takes (default 1).

    Raises:
        InputError: no such file, or it holds no linear head.
    """
    info = HeadInfo(layers=layers or 1)
    tensors = read_weights(path, "--head")
    if not {"weight", "bias"} <= tensors.keys():
        raise InputError(f"{path} holds no linear head (a weight and a bias): give --head the file of a linear head")
    weight, bias = tensors["weight"], tensors["bias"]
    if weight.ndim != 2 or bias.shape != weight.shape[:1]:
        raise InputError(
            f"{path} holds a weight of shape {list(weight.shape)} and a bias of shape {list(bias.shape)}, "
            f"which are no linear head: give --head another file"
        )
    if not (torch.isfinite(weight).all() and torch.isfinite(bias).all()):
        raise InputError(f"the head {path} is not finite (NaN or Inf): train it again, or give --head another file")
    if path.suffix == ".safetensors":
        with safetensors.safe_open(str(path), "pt") as file:
            said = json.loads((file.metadata() or {}).get("vitoats_head", "{}"))
        if said:
            info = HeadInfo(**{**said, "classes": tuple(said["classes"])})
    if layers is not None and layers != info.layers:
        raise InputError(f"{path} is a head for {info.layers} layers: leave --head-layers out")
    return weight, bias, info


def attach_head(backbone: Any, path: Path, layers: int | None = None) -> LinearHeadClassifier:
    """Puts a head file on a backbone.

    Raises:
        InputError: the head does not fit the backbone.
    """
    _check_class_token(backbone)
    weight, bias, info = load_head(path, layers)
    expected = (info.layers + 1) * backbone.num_features
    if weight.shape[1] != expected:
        remedy = "use the head of this backbone"
        other = 5 - info.layers  # 4 layers where 1 was assumed, and the other way round
        if weight.shape[1] == (other + 1) * backbone.num_features:
            remedy = f"give --head-layers {other}"
        raise InputError(
            f"the head {path} takes {weight.shape[1]} features, but {info.layers} layer(s) of this backbone "
            f"give {expected}: {remedy}"
        )
    if info.layers > len(backbone.blocks):
        raise InputError(
            f"the head {path} takes {info.layers} layers, but this backbone has {len(backbone.blocks)}: use another head"
        )
    return LinearHeadClassifier(backbone, weight, bias, info)
