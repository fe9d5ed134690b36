"""Files of linear heads (``vitoats.models.heads``): reading, writing, and attaching a head to its backbone.

A head file is either a safetensors file with ``weight`` and ``bias``, whose metadata names the backbone, or one of Meta's
files (``dinov2_vitb14_linear_head.pth``, ``dinov2_vitb14_reg4_linear4_head.pth``), whose file name does.
"""

import json
import logging
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitoats.common.errors import InputError
from vitoats.common.fingerprint import tensors_sha256
from vitoats.common.json_files import parse_json
from vitoats.common.tensor_files import save_tensors
from vitoats.loading.names import DINOV2
from vitoats.loading.weights import open_tensors, read_weights
from vitoats.models import heads
from vitoats.models.heads import HeadInfo, LinearHeadClassifier

log = logging.getLogger("vitoats")

OFFICIAL_NAME = r"(dinov2_vit[sblg]14)(_reg4)?_linear(4)?_head"
OFFICIAL_IMG_SIZE = 224  # image size at which Meta trained and evaluated its heads
ABOUT, CHECKSUM = "vitoats_head", "tensors_sha256"  # keys of the metadata


def save_head(path: Path, weight: Tensor, bias: Tensor, info: HeadInfo) -> None:
    """Writes a head file."""
    tensors = {"weight": weight.contiguous(), "bias": bias.contiguous()}
    save_tensors(path, tensors, {ABOUT: json.dumps(asdict(info)), CHECKSUM: tensors_sha256(tensors)})


def load_head(path: Path) -> tuple[Tensor, Tensor, HeadInfo | None]:
    """Reads a head file.

    Args:
        path: our format (.safetensors) or Meta's (.pth), of which only plain tensors are unpickled.

    Returns:
        weight [n_classes, d_in], bias [n_classes], and the ``HeadInfo``, or None if the file does not record it.

    Raises:
        InputError: the file does not exist, does not hold a valid linear head, or is damaged.
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
        with open_tensors(path) as file:
            metadata = file.metadata() or {}
        if metadata.get(CHECKSUM) not in (None, tensors_sha256(tensors)):
            raise InputError(f"the head {path} is damaged (its checksum is another): copy it again")
        try:
            return weight, bias, None if ABOUT not in metadata else _info(parse_json(metadata[ABOUT]), weight.shape[0])
        except (ValueError, TypeError, KeyError):
            raise InputError(f"{path} does not say rightly what it was made for: train it again, or use another head") from None
    official = re.fullmatch(OFFICIAL_NAME, path.stem)
    if official is None:
        return weight, bias, None
    name, registers, layers = official.groups()
    return weight, bias, HeadInfo(name + ("_reg" if registers else ""), layers=int(layers or 1))


def _info(said: dict[str, Any], n_classes: int) -> HeadInfo:
    info = HeadInfo(**{**said, "classes": tuple(said["classes"])})
    texts = (info.backbone, *info.classes)
    numbers = (info.img_size, info.layers)
    fits = all(isinstance(text, str) for text in texts) and all(type(number) is int for number in numbers)
    if not fits or info.img_size < 0 or type(info.patch_mean) is not bool or info.layers < 0 or not info.tokens:
        raise ValueError(said)
    if len(info.classes) not in (0, n_classes):
        raise ValueError(said)
    return info


def attach_head(backbone: Any, path: Path, layers: int | None = None, *, source: str, img_size: int) -> LinearHeadClassifier:
    """Attaches a head file to a backbone.

    Args:
        backbone: a timm model without a classifier.
        path: the head file.
        layers: number of layers that the head takes, if the file does not record it; None infers it from the head's width.
        source: the backbone's model name before compression.
        img_size: size of the backbone's input images, in pixels.

    Raises:
        InputError: the head was made for another backbone or image size, or does not fit this backbone.
    """
    weight, bias, info = load_head(path)
    width = weight.shape[1] / heads.width(backbone)
    if info is None and not heads.has_class_token(backbone):
        info = HeadInfo(layers=0)
    if info is None:
        info = HeadInfo(layers=layers or (int(width) - 1 if width in (2, 5) else 1))
    if layers not in (None, info.layers):
        raise InputError(f"{path} is a head for {info.layers} layers: leave `head_layers` out")
    heads.check_class_tokens(backbone, info.layers)
    if width != info.tokens:
        raise InputError(
            f"the head {path} takes {weight.shape[1]} features, but {info.layers} layer(s) of this backbone "
            f"give {info.tokens * heads.width(backbone)}: use the head of this backbone"
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
    """Whether two names may mean the same model; a name without a tag matches any tag, and folder names match everything."""
    if not one or not other or any(":" in name or "/" in name for name in (one, other)):
        return True
    first, second = ((DINOV2[name].timm_name if name in DINOV2 else name).partition(".") for name in (one, other))
    return first[0] == second[0] and (first[2] == second[2] or not first[2] or not second[2])
