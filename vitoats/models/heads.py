"""Linear heads on frozen features: a file of its own, and the module that puts it on a backbone.

Features follow DINOv2's linear evaluation: the class token of the last ``layers`` blocks, each after the final norm, then
the mean of the last block's patch tokens; register tokens are left out. A head [n_classes, (layers + 1) * d] is a
safetensors file with ``weight`` and ``bias`` whose metadata says what it was made for, or one of Meta's files
(``dinov2_vitb14_linear_head.pth``, ``dinov2_vitb14_reg4_linear4_head.pth``), whose name says it.
"""

import json
import logging
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from vitoats.common.errors import InputError
from vitoats.common.tensor_files import save_tensors
from vitoats.loading.names import DINOV2
from vitoats.loading.weights import read_weights

log = logging.getLogger("vitoats")

OFFICIAL_NAME = r"(dinov2_vit[sblg]14)(_reg4)?_linear(4)?_head"
OFFICIAL_IMG_SIZE = 224  # at which Meta trained and evaluated them


@dataclass(frozen=True)
class HeadInfo:
    """What a head was made for, as its file says it.

    Attributes:
        backbone: the backbone's model name, "" where the file does not say.
        img_size: in pixels, 0 where the file does not say.
        layers: how many blocks give their class token, 1 or 4.
        patch_mean: whether the mean of the patch tokens follows them; without it the head is [n_classes, layers * d].
        classes: class names in the order of the outputs, empty where the file does not say.
    """

    backbone: str = ""
    img_size: int = 0
    layers: int = 1
    classes: tuple[str, ...] = ()
    patch_mean: bool = True

    @property
    def tokens(self) -> int:
        """How many vectors of the backbone's width it takes."""
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
    """[class tokens of the last ``layers`` blocks, mean of the last patch tokens], [batch, (layers + patch_mean) * d]."""
    _check_class_token(backbone)
    if layers == 1:
        tokens = backbone.forward_features(x)
        cls, patches = [tokens[:, 0]], tokens[:, backbone.num_prefix_tokens :]
    else:
        outputs = backbone.get_intermediate_layers(x, n=layers, return_prefix_tokens=True, norm=True)
        cls, patches = [prefix[:, 0] for _, prefix in outputs], outputs[-1][0]
    return torch.cat([*cls, patches.mean(dim=1)] if patch_mean else cls, dim=1)


def _check_class_token(backbone: Any) -> None:
    if not getattr(backbone, "num_prefix_tokens", 0):
        raise InputError(
            f"{type(backbone).__name__} has no class token here, which a linear head takes: use a ViT with one, such as DINOv2"
        )


def save_head(path: Path, weight: Tensor, bias: Tensor, info: HeadInfo) -> None:
    """Writes a head file."""
    tensors = {"weight": weight.contiguous(), "bias": bias.contiguous()}
    save_tensors(path, tensors, {"vitoats_head": json.dumps(asdict(info))})


def load_head(path: Path) -> tuple[Tensor, Tensor, HeadInfo | None]:
    """Reads a head file.

    Args:
        path: ours (.safetensors) or Meta's (.pth); a pickle is read as plain tensors only.

    Returns:
        weight [n_classes, d_in], bias [n_classes], and what the file says it was made for, None where it says nothing.

    Raises:
        InputError: no such file, or it holds no linear head.
    """
    tensors = read_weights(path, "head")
    if not {"weight", "bias"} <= tensors.keys():
        raise InputError(f"{path} holds no linear head (a weight and a bias): give `head` the file of a linear head")
    weight, bias = tensors["weight"], tensors["bias"]
    if weight.ndim != 2 or bias.shape != weight.shape[:1]:
        raise InputError(
            f"{path} holds a weight of shape {list(weight.shape)} and a bias of shape {list(bias.shape)}, "
            f"which are no linear head: give `head` another file"
        )
    if not (torch.isfinite(weight).all() and torch.isfinite(bias).all()):
        raise InputError(f"the head {path} is not finite (NaN or Inf): train it again, or give `head` another file")
    if path.suffix == ".safetensors":
        with safetensors.safe_open(str(path), "pt") as file:
            said = (file.metadata() or {}).get("vitoats_head")
        try:
            return weight, bias, None if said is None else _info(json.loads(said), weight.shape[0])
        except (ValueError, TypeError, KeyError):
            raise InputError(f"{path} does not say rightly what it was made for: train it again, or use another head") from None
    official = re.fullmatch(OFFICIAL_NAME, path.stem)
    if official is None:
        return weight, bias, None
    name, registers, layers = official.groups()
    return weight, bias, HeadInfo(name + ("_reg" if registers else ""), layers=int(layers or 1))


def _info(said: dict[str, Any], n_classes: int) -> HeadInfo:
    info = HeadInfo(**{**said, "classes": tuple(said["classes"])})
    if info.layers < 1 or len(info.classes) not in (0, n_classes):
        raise ValueError(said)
    return info


def attach_head(backbone: Any, path: Path, layers: int | None = None, *, source: str, img_size: int) -> LinearHeadClassifier:
    """Puts a head file on a backbone.

    Args:
        backbone: a timm model without classifier.
        path: the head file.
        layers: how many layers it takes, where the file does not say; by its width where None.
        source: the name of the model that the backbone is, or was before it was compressed.
        img_size: in pixels, of the images it will see.

    Raises:
        InputError: the head was made for another backbone or image size, or does not fit this one.
    """
    _check_class_token(backbone)
    weight, bias, info = load_head(path)
    width = weight.shape[1] / backbone.num_features
    if info is None:
        info = HeadInfo(layers=layers or (int(width) - 1 if width in (2, 5) else 1))
    if layers not in (None, info.layers):
        raise InputError(f"{path} is a head for {info.layers} layers: leave `head_layers` out")
    if width != info.tokens:
        raise InputError(
            f"the head {path} takes {weight.shape[1]} features, but {info.layers} layer(s) of this backbone "
            f"give {info.tokens * backbone.num_features}: use the head of this backbone"
        )
    if info.layers > len(backbone.blocks):
        raise InputError(
            f"the head {path} takes {info.layers} layers, but this backbone has {len(backbone.blocks)}: use another head"
        )
    if not same_model(info.backbone, source):
        raise InputError(f"the head {path} was made for {info.backbone}, not for {source}: use the head of this backbone")
    if info.img_size not in (0, img_size):
        raise InputError(f"the head {path} was made for images of {info.img_size} px, not {img_size}: change `img_size`")
    if re.fullmatch(OFFICIAL_NAME, path.stem) and img_size != OFFICIAL_IMG_SIZE:
        log.warning("%s was trained and evaluated at %d px, not %d", path, OFFICIAL_IMG_SIZE, img_size)
    info = replace(info, backbone=info.backbone or source, img_size=img_size)
    return LinearHeadClassifier(backbone, weight, bias, info)


def same_model(one: str, other: str) -> bool:
    """Whether two names may be the same model; a name without a tag may have any, and those of folders tell nothing."""
    if not one or not other or any(":" in name or "/" in name for name in (one, other)):
        return True
    first, second = ((DINOV2[name].timm_name if name in DINOV2 else name).partition(".") for name in (one, other))
    return first[0] == second[0] and (first[2] == second[2] or not first[2] or not second[2])
