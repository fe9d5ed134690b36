"""Loads a timm model by the name of a model, folder or Hub repository, with its own weights or those of a file."""

import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import nn

import vitoats.common.torchvision_ops  # noqa: F401  (before timm)
from vitoats.common.errors import InputError, one_line
from vitoats.data.transforms import Preprocessing
from vitoats.loading.adaptations import Shapes, check_channels, image_size, say_changes
from vitoats.loading.hub import announce_fetch, cannot_fetch, fetch_config, fetch_weights
from vitoats.loading.loaded import LoadedModel
from vitoats.loading.lookup import check_name
from vitoats.loading.names import DINOV2
from vitoats.loading.sketch import WITHOUT_FILE, Held, create, sketch
from vitoats.loading.timm_config import TimmConfig, read_config
from vitoats.loading.weights import read_weights, tensor_shapes, weights_file
from vitoats.models.positions import set_image_size

import timm  # isort: skip
from timm.data.model_config import resolve_input_data_config  # isort: skip
from timm.models._input import get_model_input_config  # isort: skip

LOCAL, HUB = "local-dir:", "hf-hub:"

log = logging.getLogger("vitoats")


def load_timm(
    name: str, checkpoint: Path | None, random_weights: bool, img_size: int | None, pos_resample: str | None
) -> LoadedModel:
    """Loads a model that timm builds; takes the same arguments as ``load_model``.

    Raises:
        InputError: the model does not exist, or its weights are missing or do not fit.
    """
    named = DINOV2.get(name)
    timm_name = named.timm_name if named else name
    img_size = img_size or (named.img_size if named else None)
    way = pos_resample or ("official" if named else "timm")
    check_name(name, timm_name, needs_weights=not random_weights and checkpoint is None)
    # timm resizes position embeddings as it loads them; to resize them in another way, load them at their own size first
    kwargs = {} if img_size is None or way != "timm" else {"img_size": img_size}
    try:
        if random_weights:
            weights = "random weights"
            model = _with_random_weights(timm_name, kwargs)
        elif checkpoint is not None:
            weights = str(checkpoint)
            state = read_weights(checkpoint)
            model = _with_weights_of(timm_name, checkpoint, state, img_size, kwargs)
            if way != "timm" and img_size is not None:
                _check_positions(checkpoint, state, model)
        else:
            weights = announce_fetch(name, timm_name, named)
            model = _with_own_weights(timm_name, img_size, kwargs)
    except (InputError, MemoryError):
        raise
    except safetensors.SafetensorError as error:
        raise InputError(f"model.safetensors of {name} is damaged ({one_line(error, 100)}): copy the folder again") from None
    except OSError as error:
        raise cannot_fetch(name, timm_name, named, one_line(error, 150)) from None
    except Exception as error:  # architectures raise various errors on arguments and weights that do not fit
        raise InputError(_explain(name, checkpoint, img_size, error)) from error
    _check_img_size(name, model, img_size)
    if way != "timm" and img_size is not None:
        if getattr(model, "pos_embed", None) is None or not hasattr(model, "no_embed_class"):
            raise InputError(f"{name} has no position embedding of its own to resize: leave `pos_resample` out")
        set_image_size(model, img_size, way)
        weights += f", positions resized as in {way}"
    if named:
        preprocessing = _preprocessing(model, {"img_size": img_size, "crop_pct": named.crop_pct})
    else:
        preprocessing = resolved_preprocessing(model, img_size)
    return LoadedModel(name, model, preprocessing, weights)


def _with_random_weights(timm_name: str, kwargs: dict[str, Any]) -> nn.Module:
    """Builds the model with random weights, the same ones every time."""
    config = _stored_config(timm_name)
    if config is not None:
        sketch(config, WITHOUT_FILE, **kwargs)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return timm.create_model(timm_name, pretrained=False, **kwargs) if config is None else create(config, **kwargs)


def _with_own_weights(timm_name: str, img_size: int | None, kwargs: dict[str, Any]) -> nn.Module:
    """Loads the weights that timm names, or those beside config.json; sources of weights in config.json are ignored.

    Raises:
        InputError: the weights are for images with other channels, or config.json gives two numbers of classes.
    """
    config = _stored_config(timm_name)
    if config is None:
        model = timm.create_model(timm_name, pretrained=True, **kwargs)
        trained = model.pretrained_cfg["input_size"][-1]
        if "img_size" in kwargs and img_size != trained:
            log.info("the weights of %s were made for %d px and are resized for %d", timm_name, trained, img_size)
        return model
    said, wanted = config.pretrained_cfg.get("num_classes"), config.model_args.get("num_classes")
    if said and wanted and said != wanted:  # timm would take a random classifier
        raise InputError(f"{config.path} says both {said} and {wanted} classes: correct it there")
    file = fetch_weights(timm_name) if timm_name.startswith(HUB) else weights_file(Path(timm_name.removeprefix(LOCAL)))
    assert file is not None  # check_name has seen it
    shapes = tensor_shapes(file)
    outline = sketch(config, Held(len(shapes), file.stat().st_size), **kwargs)
    kwargs = kwargs | _own_size(str(file), shapes, outline, img_size)
    model = timm.create_model(
        config.architecture,
        pretrained=True,
        pretrained_cfg=config.pretrained_cfg | {"file": str(file)},
        pretrained_model_args=config.model_args,
        **(config.model_args | kwargs),
    )
    say_changes(str(file), shapes, model, asked=img_size is not None)
    return model


def _own_size(source: str, shapes: Shapes, outline: nn.Module, img_size: int | None) -> dict[str, int]:
    """The image size of the weights as an argument of the model, if none was asked for and theirs is not the usual one.

    Raises:
        InputError: the weights are for images with other channels.
    """
    check_channels(source, shapes, outline)
    size = None if img_size is not None else image_size(shapes, outline)
    if size is None:
        return {}
    log.info("the weights %s are for images of %d px, so the model takes these (`img_size` changes it)", source, size)
    return {"img_size": size}


def _with_weights_of(
    timm_name: str, file: Path, state: dict[str, torch.Tensor], img_size: int | None, kwargs: dict[str, Any]
) -> nn.Module:
    """Loads the weights of a file, which timm converts like pretrained weights of the architecture.

    The number of classes is that of the file's classifier, or 0 if weights in timm's format have none. The image size, if none
    is asked for, is that of the file's position embedding.

    Raises:
        InputError: the weights are for images with other channels.
    """
    config = _stored_config(timm_name)
    if config is not None:
        pretrained_cfg, arguments = dict(config.pretrained_cfg), dict(config.model_args)
    else:
        found = timm.get_pretrained_cfg(timm_name)
        pretrained_cfg = {} if found is None else found.to_dict(remove_source=True, remove_null=True)
        arguments = {}
    usual = arguments.get("num_classes", pretrained_cfg.get("num_classes"))
    classifier = pretrained_cfg.get("classifier") or "head"
    key = f"{classifier if isinstance(classifier, str) else classifier[0]}.weight"
    if key in state:
        arguments["num_classes"] = pretrained_cfg["num_classes"] = state[key].shape[0]
    elif "patch_embed.proj.weight" in state and "mask_token" not in state:
        arguments["num_classes"] = pretrained_cfg["num_classes"] = 0
    if "num_classes" in arguments and usual and arguments["num_classes"] != usual:
        classes = f"a classifier of {arguments['num_classes']} classes" if arguments["num_classes"] else "no classifier"
        log.info("the weights %s have %s, as the model now has; %s usually has %d classes", file, classes, timm_name, usual)
    arguments |= kwargs
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if config is not None:
        described = replace(config, pretrained_cfg=pretrained_cfg, model_args=arguments)
        outline = sketch(described, Held(len(state), file.stat().st_size))
    else:
        with torch.device("meta"):
            outline = timm.create_model(timm_name, pretrained=False, **arguments)
    arguments |= _own_size(str(file), shapes, outline, img_size)
    model = timm.create_model(
        config.architecture if config is not None else timm_name,
        pretrained=True,
        pretrained_cfg=pretrained_cfg | {"state_dict": state},
        **arguments,
    )
    model.pretrained_cfg.pop("state_dict", None)
    say_changes(str(file), shapes, model, asked=img_size is not None)
    return model


def _stored_config(timm_name: str) -> TimmConfig | None:
    """The configuration of a folder or repository; None for a model of timm's own."""
    if timm_name.startswith(LOCAL):
        return read_config(Path(timm_name.removeprefix(LOCAL)))
    return read_config(fetch_config(timm_name)) if timm_name.startswith(HUB) else None


def _explain(name: str, checkpoint: Path | None, img_size: int | None, error: Exception) -> str:
    """Summarises an error of timm or torch in one line, with advice."""
    text = re.sub(r"Error\(s\) in loading state_dict for \w+: ?", "", one_line(error, 1000))
    text = text if len(text) <= 300 else text[:300] + "..."
    if checkpoint is not None:
        return f"the weights {checkpoint} do not fit {name}: {text}; use the model they were made for"
    if "Missing key" in text or "Unexpected key" in text or "size mismatch" in text:
        return f"the weights of {name} do not fit its architecture: {text}; save the folder again"
    if img_size is not None:
        return f"{name} cannot be built for `img_size` {img_size}: {text}"
    return f"{name} cannot be built: {text}"


def _check_img_size(name: str, model: Any, img_size: int | None) -> None:
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    step = patch if isinstance(patch, int) else patch[0] if patch else 1
    if img_size is not None and img_size % step:
        raise InputError(f"{name} takes image sizes that are multiples of {step}, not {img_size}: change `img_size`")


def _check_positions(checkpoint: Path, state: dict[str, torch.Tensor], model: Any) -> None:
    """Refuses weights whose position embedding was already resized, since it would be resized a second time."""
    patches = model.patch_embed.num_patches
    held = state["pos_embed"].shape[1] if "pos_embed" in state and state["pos_embed"].ndim == 3 else patches
    if held not in (patches, patches + 1, patches + model.num_prefix_tokens):
        raise InputError(
            f"{checkpoint} holds {held} positions, not those of {patches} patches, so it was resized already: "
            f"use `pos_resample='timm'`"
        )


def resolved_preprocessing(model: Any, img_size: int | None) -> Preprocessing:
    """The preprocessing that timm recommends for a model.

    The image size is ``img_size``. If that is None, it is timm's test size, or the size that the model was built for if that
    differs from the pretrained size.

    Raises:
        InputError: the model does not take square RGB images of that size.
    """
    built = tuple(get_model_input_config(model)["input_size"])
    published = tuple(model.pretrained_cfg.get("input_size", built))
    args: dict[str, Any] = {} if img_size is None else {"img_size": img_size}
    if img_size is None and built != published:
        args = {"input_size": built}
    return _preprocessing(model, args)


def _preprocessing(model: Any, args: dict[str, Any]) -> Preprocessing:
    try:
        return Preprocessing.from_timm(resolve_input_data_config(model, args, use_test_size=True))
    except InputError:
        raise
    except Exception as error:  # a stored configuration may hold anything
        raise InputError(f"this {type(model).__name__} takes no such images: {one_line(error, 150)}") from error
