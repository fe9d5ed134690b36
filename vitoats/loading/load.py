"""Loads a model with its preprocessing, by name, from a folder or from memory."""

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from vitoats.common.errors import InputError
from vitoats.common.finite import check_weights
from vitoats.common.sizes import ImageSize, in_words, is_size
from vitoats.data.transforms import MAX_IMG_SIZE, Preprocessing
from vitoats.loading import embedded
from vitoats.loading.checkpoint import HEAD, is_checkpoint, load_checkpoint
from vitoats.loading.head_files import HeadFile, attach_head
from vitoats.loading.hub import hub_folder
from vitoats.loading.image_sizes import check_image_size, check_multiple
from vitoats.loading.language_models import is_language_model, load_language_model
from vitoats.loading.loaded import LoadedModel
from vitoats.loading.lookup import check_name
from vitoats.loading.names import EMBEDDED, EMBEDDED_IMG_SIZE, HUB_NAMES, ON_HUB
from vitoats.loading.timm_model import load_timm, resolved_preprocessing
from vitoats.models.positions import set_image_size

EMBEDDED_HEAD = Path(__file__).parent.parent / "data" / "fashion_mnist_head.safetensors"
_EMBEDDED_WEIGHTS = f"DINOv2-S-derived, from the package {embedded.PACKAGE} {embedded.PACKAGE_VERSION}"

log = logging.getLogger("vitoats")


def load(folder: str | Path) -> nn.Module:
    """Loads a compressed model in one call.

    A vision model maps images [batch, 3, h, w] to logits, or to features without a head; a language model is a transformers
    model, which generates.

    Args:
        folder: a folder that compress wrote, or hf-hub:owner/name for a folder on the Hub.

    Raises:
        InputError: the folder does not exist, or its files do not belong together.
    """
    on_hub = str(folder).startswith("hf-hub:")
    name = str(folder) if on_hub else str(Path(folder).resolve())
    return (load_language_model(name) if is_language_model(name, look_at_hub=True) else load_model(name)).model


def load_model(
    name: str,
    *,
    checkpoint: Path | None = None,
    random_weights: bool = False,
    img_size: ImageSize | None = None,
    crop_mode: str | None = None,
    head: Path | None = None,
    head_layers: int | None = None,
    head_name: str | None = None,
    with_head: bool = True,
    pos_resample: str | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    interpolation: str | None = None,
    crop_pct: float | None = None,
) -> LoadedModel:
    """Loads a model by name.

    Args:
        name: a hub-style name of DINOv2 or DINOv3, ``dinov2s_derived``, a timm name (``arch`` or ``arch.tag``),
            ``hf-hub:owner/name``, ``local-dir:/path``, or a folder that ``compress`` wrote, on disk or on the Hub.
        checkpoint: a .pth or .safetensors file with the weights, instead of the model's own weights.
        random_weights: build the architecture with random weights; nothing is fetched.
        img_size: image size in pixels, or (height, width); None for the model's usual size.
        crop_mode: "center", "squash" (resize both sides, as in the OATS paper) or "border"; None for the model's own mode.
        head: a linear head file for a backbone without a head.
        head_layers: number of layers that the head takes, if its file does not record it.
        head_name: the head's name in its file, or a part of it, if that holds several.
        with_head: attach the linear head that belongs to ``dinov2s_derived`` or to a compressed folder.
        pos_resample: how the position embedding is resized (``vitoats.models.positions``): by default "official" for
            hub-style DINOv2 names, "hf" for folders of transformers' DINOv2, "timm" for others.
        model_kwargs: arguments of timm's architecture: {"global_pool": "avg"}.
        mean, std, interpolation, crop_pct: preprocessing other than the model's own (``data.transforms.Preprocessing``); one
            number for mean or std goes for all channels.

    Raises:
        InputError: the name is unknown, the weights are missing or do not fit, or the model does not support a setting.
    """
    if not name:
        raise InputError("no model is named: give `model` a timm name, a dinov2_ name or a folder")
    if is_language_model(name):
        raise InputError(f"{name} is a language model, which takes no images: use compress or eval_perplexity")
    if img_size is not None and not is_size(img_size, MAX_IMG_SIZE):
        raise InputError(f"an image of {img_size} px cannot be: give `img_size` a number from 1 to {MAX_IMG_SIZE}, or two")
    own_head = None
    if ("/" in name and not name.startswith(("hf-hub:", "local-dir:"))) or Path(name).is_dir():
        _refuse_other_weights(f"{name} has its own weights", checkpoint, random_weights, pos_resample, model_kwargs)
        loaded = _load_folder(Path(name), img_size)
        own_head = Path(name) / HEAD
    elif folder := _folder_on_hub(name, checkpoint, random_weights):
        loaded = _load_folder(folder, img_size)
        loaded.name, loaded.weights = name, f"{name.removeprefix('hf-hub:')}{ON_HUB}"
        own_head = folder / HEAD
    elif name == EMBEDDED:
        reason = f"{EMBEDDED} has its own weights (other ones go with dinov2_vits14)"
        _refuse_other_weights(reason, checkpoint, random_weights, pos_resample, model_kwargs)
        size = img_size or EMBEDDED_IMG_SIZE
        loaded = LoadedModel(name, embedded.load_backbone(size), Preprocessing(img_size=size, crop_pct=1.0), _EMBEDDED_WEIGHTS)
        own_head = EMBEDDED_HEAD
    else:
        loaded = load_timm(name, checkpoint, random_weights, img_size, pos_resample, model_kwargs or {})
        if not with_head:
            loaded.model = loaded.timm_model
    settings = {"mean": mean, "std": std, "interpolation": interpolation, "crop_pct": crop_pct}
    loaded.preprocessing = loaded.preprocessing.changed(crop_mode, settings)
    check_weights(loaded.name, loaded.model.state_dict())
    if head is None and with_head and own_head is not None and own_head.is_file():
        head = own_head
    if head is None and head_name is not None:
        raise InputError(f"there is no head file to look for {head_name[:100]!r} in: give `head`, or leave `head_name` out")
    if head is not None:
        if loaded.n_classes:
            raise InputError(f"{name} has a classifier of its own: leave `head` out")
        size = loaded.preprocessing.img_size
        loaded.model = attach_head(
            loaded.timm_model, HeadFile(head, head_layers, head_name), source=loaded.source, img_size=size
        )
    loaded.model.eval().requires_grad_(False)
    check_image_size(loaded)
    return loaded


def from_memory(
    model: nn.Module, *, name: str | None = None, img_size: ImageSize | None = None, preprocessing: Preprocessing | None = None
) -> LoadedModel:
    """Wraps a copy of a timm model that is already in memory; the caller's model stays unchanged.

    Args:
        model: a model created by ``timm.create_model``.
        name: the model's name; None for timm's name of its architecture and pretrained weights.
        img_size: image size in pixels, or (height, width); None for timm's test size, or for the size that the model was built
            for if that differs from the pretrained size.
        preprocessing: its preprocessing; None for the one that timm recommends.

    Raises:
        InputError: ``model`` is not a timm model, does not take images of that size, or has NaN or infinite weights.
    """
    config = getattr(model, "pretrained_cfg", None)
    if not isinstance(model, nn.Module) or not isinstance(config, dict) or not config.get("architecture"):
        raise InputError(f"a {type(model).__name__} is no timm model: give `model` one that timm.create_model made")
    if preprocessing is not None and img_size not in (None, preprocessing.img_size):
        raise InputError(f"the preprocessing is for {preprocessing.img_size} px, not {img_size}: leave `img_size` out")
    size = img_size or (preprocessing.img_size if preprocessing else None)
    resolved = resolved_preprocessing(model, size)
    if name is None:
        name = ".".join(part for part in (config["architecture"], config.get("tag")) if part)
    loaded = LoadedModel(name, copy.deepcopy(model), preprocessing or resolved, "given in memory")
    check_weights(loaded.name, loaded.model.state_dict())
    loaded.model.eval().requires_grad_(False)
    check_image_size(loaded)
    return loaded


def _refuse_other_weights(
    reason: str,
    checkpoint: Path | None,
    random_weights: bool,
    pos_resample: str | None,
    model_kwargs: Mapping[str, Any] | None,
) -> None:
    given = {"checkpoint": checkpoint is not None, "random_weights": random_weights, "pos_resample": pos_resample is not None}
    given["model_kwargs"] = bool(model_kwargs)
    for argument, is_given in given.items():
        if is_given:
            raise InputError(f"{reason}: leave `{argument}` out")


def _folder_on_hub(name: str, checkpoint: Path | None, random_weights: bool) -> Path | None:
    """The local copy of a compressed folder on the Hub; None if the name or the arguments request something else."""
    if not name.startswith("hf-hub:") or checkpoint is not None or random_weights:
        return None
    check_name(name, name, needs_weights=True)
    return hub_folder(name)


def _load_folder(folder: Path, img_size: ImageSize | None) -> LoadedModel:
    if not folder.is_dir():
        hub = "" if folder.is_absolute() else f", or hf-hub:{folder} for the Hub"
        raise InputError(f"there is no model folder {folder}: use a folder that compress wrote{hub}")
    if not is_checkpoint(folder):
        raise InputError(
            f"{folder} was not written by compress (it has no vitoats.json): for a timm folder use local-dir:{folder}"
        )
    loaded = load_checkpoint(folder)
    if img_size not in (None, loaded.preprocessing.img_size):
        _resize_positions(loaded, img_size)
    return loaded


def _resize_positions(loaded: LoadedModel, img_size: ImageSize) -> None:
    """Makes a compressed model take images of another size, and says so.

    Raises:
        InputError: it has no position embedding that can be resized.
    """
    model, size = loaded.timm_model, loaded.preprocessing.img_size
    if getattr(model, "pos_embed", None) is None or not (hasattr(model, "no_embed_class") and hasattr(model, "set_input_size")):
        raise InputError(f"{loaded.name} was compressed for {in_words(size)} px: leave `img_size` out, or compress again")
    check_multiple(loaded.name, model, img_size)
    named = HUB_NAMES.get(loaded.source)
    set_image_size(model, img_size, named.pos_resample if named else "timm")
    loaded.preprocessing = replace(loaded.preprocessing, img_size=img_size)
    log.warning(
        "%s was compressed for %s px; its positions are resized for %s px, which may cost accuracy",
        *(loaded.name, in_words(size), in_words(img_size)),
    )
