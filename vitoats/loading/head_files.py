"""Files of linear heads (``vitoats.models.heads``): reading, writing, and attaching a head to its backbone.

A head file is a safetensors file with ``weight`` and ``bias``, whose metadata names the backbone; one of Meta's files
(``dinov2_vitb14_linear_head.pth``, ``dinov2_vitb14_reg4_linear4_head.pth``), whose file name does; or any other file with
linear classifiers (``vitoats.loading.classifiers``).
"""

import json
import logging
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitoats.common.errors import InputError
from vitoats.common.fingerprint import tensors_sha256
from vitoats.common.json_files import parse_json
from vitoats.common.sizes import ImageSize, from_json, in_words, is_size
from vitoats.common.tensor_files import save_tensors
from vitoats.data.transforms import MAX_IMG_SIZE
from vitoats.loading.classifiers import Classifier, choose, features_of, find_classifiers
from vitoats.loading.names import HUB_NAMES
from vitoats.loading.weights import check_stored, open_tensors, read_content
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


def load_head(
    path: Path, name: str | None = None, width: int = 1, layers: int | None = None
) -> tuple[Classifier, HeadInfo | None]:
    """Reads a head file.

    Args:
        path: our format (.safetensors), or a .pth, of which only plain tensors are unpickled.
        name: the classifier's name, or a part of it, if the file holds several.
        width: width of the backbone, by which one of several classifiers is chosen.
        layers: number of layers that it takes, if that is known.

    Returns:
        the classifier, and the ``HeadInfo``, or None if the file does not record it.

    Raises:
        InputError: the file does not exist, does not hold a valid linear head, or is damaged.
    """
    content = read_content(path, "head")
    found = find_classifiers(path, content)
    chosen = choose(path, found, name, width, layers)
    check_stored(path, {"weight": chosen.weight, "bias": chosen.bias}, "head")
    if not (torch.isfinite(chosen.weight).all() and torch.isfinite(chosen.bias).all()):
        raise InputError(f"the head {path} is not finite (NaN or Inf): train it again, or give `head` another file")
    if path.suffix == ".safetensors":
        with open_tensors(path) as file:
            metadata = file.metadata() or {}
        if metadata.get(CHECKSUM) not in (None, tensors_sha256(content)):
            raise InputError(f"the head {path} is damaged (its checksum is another): copy it again")
        try:
            return chosen, None if ABOUT not in metadata else _info(parse_json(metadata[ABOUT]), len(chosen.weight))
        except (ValueError, TypeError, KeyError):
            raise InputError(f"{path} does not say rightly what it was made for: train it again, or use another head") from None
    official = re.fullmatch(OFFICIAL_NAME, path.stem)
    if official is None:
        return chosen, None
    model, registers, n_layers = official.groups()
    return chosen, HeadInfo(model + ("_reg" if registers else ""), layers=int(n_layers or 1))


def _info(said: dict[str, Any], n_classes: int) -> HeadInfo:
    info = HeadInfo(**{**said, "classes": tuple(said["classes"]), "img_size": from_json(said.get("img_size", 0))})
    texts = (info.backbone, *info.classes)
    fits = all(isinstance(text, str) for text in texts) and type(info.layers) is int and type(info.patch_mean) is bool
    if not (fits and (is_size(info.img_size, MAX_IMG_SIZE) or (type(info.img_size) is int and info.img_size == 0))):
        raise ValueError(said)
    if info.layers < 0 or not info.tokens:
        raise ValueError(said)
    if len(info.classes) not in (0, n_classes):
        raise ValueError(said)
    return info


@dataclass(frozen=True)
class HeadFile:
    """A head file, and what it does not say.

    Attributes:
        path: the file.
        layers: number of layers that the head takes, if the file does not record it; None infers it from the head's width.
        name: the classifier's name, or a part of it, if the file holds several.
    """

    path: Path
    layers: int | None = None
    name: str | None = None


def attach_head(backbone: Any, head: HeadFile, *, source: str, img_size: ImageSize) -> LinearHeadClassifier:
    """Attaches a head file to a backbone.

    Args:
        backbone: a timm model without a classifier.
        head: the head file.
        source: the backbone's model name before compression.
        img_size: size of the backbone's input images, in pixels.

    Raises:
        InputError: the head was made for another backbone or image size, or does not fit this backbone.
    """

    def check(info: HeadInfo) -> None:
        heads.check_class_tokens(backbone, info.layers)

    pooled = not heads.has_class_token(backbone)
    chosen, info = fitting_head(head, heads.width(backbone), check, source=source, img_size=img_size, pooled=pooled)
    return LinearHeadClassifier(backbone, chosen.weight, chosen.bias, info)


def fitting_head(
    head: HeadFile,
    width: int,
    check: Callable[[HeadInfo], None],
    *,
    source: str,
    img_size: ImageSize,
    pooled: bool = False,
) -> tuple[Classifier, HeadInfo]:
    """Reads a head file for a backbone.

    Args:
        head: the head file.
        width: width of the backbone's features.
        check: refuses heads on features that the backbone does not have.
        source: the backbone's model name before compression.
        img_size: size of the backbone's input images, in pixels.
        pooled: whether the backbone has no class tokens, so that heads take its pooled features.

    Raises:
        InputError: the head was made for another backbone or image size, or does not fit this backbone.
    """
    path = head.path
    chosen, info = load_head(path, head.name, width, head.layers)
    if info is None and pooled:
        info = HeadInfo(layers=0)
    if info is None:
        n_layers, patch_mean = features_of(path, chosen, width, head.layers)
        info = HeadInfo(layers=n_layers, patch_mean=patch_mean)
    if head.layers not in (None, info.layers):
        raise InputError(f"{path} is a head for {info.layers} layers: leave `head_layers` out")
    try:
        check(info)
    except InputError as refusal:
        raise InputError(f"the head {path} does not fit: {refusal}") from None
    if chosen.weight.shape[1] != info.tokens * width:
        raise InputError(
            f"the head {path} takes {chosen.weight.shape[1]} features, but {info.layers} layer(s) of this backbone "
            f"give {info.tokens * width}: use the head of this backbone"
        )
    if not same_model(info.backbone, source):
        raise InputError(f"the head {path} was made for {info.backbone}, not for {source}: use the head of this backbone")
    if info.img_size not in (0, img_size):
        made_for = in_words(info.img_size)
        raise InputError(f"the head {path} was made for images of {made_for} px, not {in_words(img_size)}: change `img_size`")
    if re.fullmatch(OFFICIAL_NAME, path.stem) and img_size != OFFICIAL_IMG_SIZE:
        log.warning("%s was trained and evaluated at %d px, not %s", path, OFFICIAL_IMG_SIZE, in_words(img_size))
    if chosen.name:
        log.info("the head of %s is %s", path, chosen.name)
    return chosen, replace(info, backbone=info.backbone or source, img_size=img_size)


def same_model(one: str, other: str) -> bool:
    """Whether two names may mean the same model; a name without a tag matches any tag, and folder names match everything."""
    if not one or not other or any(":" in name or "/" in name for name in (one, other)):
        return True
    first, second = ((HUB_NAMES[name].timm_name if name in HUB_NAMES else name).partition(".") for name in (one, other))
    return first[0] == second[0] and (first[2] == second[2] or not first[2] or not second[2])
