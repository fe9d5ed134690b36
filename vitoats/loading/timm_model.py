"""Loads a timm model by the name of a model, folder or Hub repository, with its own weights or those of a file."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

import vitoats.common.torchvision_ops  # noqa: F401  (before timm)
from vitoats.common.errors import InputError, one_line
from vitoats.common.fingerprint import json_sha256, tensors_sha256
from vitoats.common.noted import note
from vitoats.common.sizes import ImageSize, image_size, in_words, sides
from vitoats.data.transforms import Preprocessing
from vitoats.loading.adaptations import (
    PATCHES,
    POSITIONS,
    Shapes,
    channels,
    check_channels,
    check_numbers,
    count_patches,
    patches_of,
    say_changes,
    say_channels,
    size_of_weights,
)
from vitoats.loading.foreign import without_zero_biases
from vitoats.loading.hub import announce_fetch, cannot_fetch, fetch_config, fetch_weights
from vitoats.loading.image_sizes import check_multiple
from vitoats.loading.loaded import LoadedModel
from vitoats.loading.lookup import check_name
from vitoats.loading.misfit import cannot_build, check_arguments, do_not_fit
from vitoats.loading.names import HUB_NAMES
from vitoats.loading.readings import Reading, count_tensors, find_weights, some
from vitoats.loading.shards import INDEX
from vitoats.loading.sketch import WITHOUT_FILE, Held, create, sketch
from vitoats.loading.timm_config import TimmConfig, read_config
from vitoats.loading.transformers_config import is_transformers, read_transformers
from vitoats.loading.weights import check_stored, no_weights, read_content, stored_size, tensor_shapes, weights_file
from vitoats.models.heads import HeadInfo, LinearHeadClassifier, check_class_tokens
from vitoats.models.positions import set_image_size

import timm  # isort: skip
from timm.data.model_config import resolve_input_data_config  # isort: skip
from timm.models._input import get_model_input_config  # isort: skip

LOCAL, HUB = "local-dir:", "hf-hub:"

log = logging.getLogger("vitoats")


def load_timm(
    name: str,
    checkpoint: Path | None,
    random_weights: bool,
    img_size: ImageSize | None,
    pos_resample: str | None,
    model_kwargs: Mapping[str, Any],
) -> LoadedModel:
    """Loads a model that timm builds; takes the same arguments as ``load_model``.

    Raises:
        InputError: the model does not exist, or its weights are missing or do not fit.
    """
    named = HUB_NAMES.get(name)
    timm_name = named.timm_name if named else name
    check_name(name, timm_name, needs_weights=not random_weights and checkpoint is None)
    weights = "random weights" if random_weights else str(checkpoint)
    head = None
    try:
        if not random_weights and checkpoint is None:
            weights = announce_fetch(name, timm_name, named)
        config = _stored_config(timm_name)
        usual = named or config
        img_size = img_size or (usual.img_size if usual else None)
        way = pos_resample or (usual.pos_resample if usual else None) or "timm"
        check_arguments(name, config.architecture if config else timm_name.partition(".")[0], model_kwargs)
        kwargs = dict(model_kwargs)
        # timm resizes position embeddings as it loads them; to resize them in another way, load them at their own size first
        kwargs |= {} if img_size is None or way != "timm" else {"img_size": img_size}
        if random_weights:
            model = _with_random_weights(timm_name, config, kwargs)
        elif checkpoint is not None:
            fitting = img_size if pos_resample is None else None
            model, reading = _with_weights_of(name, timm_name, config, checkpoint, img_size, kwargs, fitting)
            head = reading.head
            if way != "timm" and img_size is not None:
                _check_positions(checkpoint, reading, model)
        else:
            model, head = _with_own_weights(timm_name, config, img_size, kwargs)
    except (InputError, MemoryError):
        raise
    except safetensors.SafetensorError as error:
        raise InputError(f"model.safetensors of {name} is damaged ({one_line(error, 100)}): copy the folder again") from None
    except OSError as error:
        raise cannot_fetch(name, timm_name, named, one_line(error, 150)) from None
    except Exception as error:  # architectures raise various errors on arguments and weights that do not fit
        raise InputError(cannot_build(name, img_size, model_kwargs, error)) from error
    if img_size is not None:
        check_multiple(name, model, img_size)
    if way != "timm" and img_size is not None:
        if getattr(model, "pos_embed", None) is None or not hasattr(model, "no_embed_class"):
            raise InputError(f"{name} has no position embedding of its own to resize: leave `pos_resample` out")
        if set_image_size(model, img_size, way):
            weights += f", positions resized as in {way}"
    if named:
        preprocessing = _preprocessing(model, {"img_size": img_size, "crop_pct": named.crop_pct})
    else:
        preprocessing = resolved_preprocessing(model, img_size)
    loaded = LoadedModel(name, model, preprocessing, weights)
    note(lambda: {f"weights of {name}": _digest(loaded)})
    if head is not None:
        check_class_tokens(model, 1)
        loaded.model = LinearHeadClassifier(model, *head, HeadInfo(name, preprocessing.img_size))
    return loaded


def _digest(loaded: LoadedModel) -> str:
    """A digest of weights and preprocessing; positions are left out, which resizing rounds anew on each processor."""
    weights = {key: tensor for key, tensor in loaded.timm_model.state_dict().items() if POSITIONS not in key}
    return json_sha256([loaded.preprocessing.to_dict(), tensors_sha256(weights)])


def _with_random_weights(timm_name: str, config: TimmConfig | None, kwargs: dict[str, Any]) -> nn.Module:
    """Builds the model with random weights, the same ones every time."""
    if config is not None:
        sketch(config, WITHOUT_FILE, **kwargs)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return timm.create_model(timm_name, pretrained=False, **kwargs) if config is None else create(config, **kwargs)


def _with_own_weights(
    timm_name: str, config: TimmConfig | None, img_size: ImageSize | None, kwargs: dict[str, Any]
) -> tuple[nn.Module, tuple[Tensor, Tensor] | None]:
    """Loads the weights that timm names, or those beside config.json; sources of weights in config.json are ignored.

    Returns:
        the model, and the weight and bias of a head on other features than its own.

    Raises:
        InputError: the weights are for images with other channels, or config.json gives two numbers of classes.
    """
    if config is None:
        model = timm.create_model(timm_name, pretrained=True, **kwargs)
        held, *trained = model.pretrained_cfg["input_size"]
        if "img_size" in kwargs and sides(kwargs["img_size"]) != tuple(trained):
            made_for = in_words(image_size(*trained))
            log.info(
                "the weights of %s were made for %s px and are resized for %s",
                timm_name,
                made_for,
                in_words(kwargs["img_size"]),
            )
        if (own := kwargs.get("in_chans", held)) != held:
            say_channels(timm_name, held, own)
        return model, None
    said, wanted = config.pretrained_cfg.get("num_classes"), config.model_args.get("num_classes")
    if said and wanted and said != wanted:  # timm would take a random classifier
        raise InputError(f"{config.path} says both {said} and {wanted} classes: correct it there")
    file = fetch_weights(timm_name) if timm_name.startswith(HUB) else weights_file(Path(timm_name.removeprefix(LOCAL)))
    assert file is not None  # check_name has seen it
    shapes = tensor_shapes(file)
    outline = sketch(config, Held(len(shapes), stored_size(file)), **kwargs)
    if file.name == INDEX or shapes.keys() != outline.state_dict().keys():
        model, reading = _with_weights_of(timm_name, timm_name, config, file, img_size, kwargs)
        return model, reading.head
    check_channels(str(file), shapes, outline, asked="in_chans" in kwargs)
    kwargs = kwargs | _own_size(str(file), shapes, outline, img_size)
    model = timm.create_model(
        config.architecture,
        pretrained=True,
        pretrained_cfg=config.pretrained_cfg | {"file": str(file)},
        pretrained_model_args=config.model_args,
        **(config.model_args | kwargs),
    )
    say_changes(str(file), shapes, model, asked=img_size is not None)
    return model, None


def _own_size(source: str, shapes: Shapes, outline: nn.Module, img_size: ImageSize | None) -> dict[str, int]:
    """The image size of the weights as an argument of the model, if none was asked for and theirs is not the usual one."""
    size = None if img_size is not None else size_of_weights(shapes, outline)
    if size is None:
        return {}
    log.info("the weights %s are for images of %d px, so the model takes these (`img_size` changes it)", source, size)
    return {"img_size": size}


def _with_weights_of(
    name: str,
    timm_name: str,
    config: TimmConfig | None,
    file: Path,
    img_size: ImageSize | None,
    kwargs: dict[str, Any],
    fitting: ImageSize | None = None,
) -> tuple[nn.Module, Reading]:
    """Loads the weights of a file, which timm converts like pretrained weights of the architecture.

    The number of classes is that of the file's classifier, or 0 if it has none. The image size, if none is asked for, is that
    of the file's position embedding. If this is for the size ``fitting`` already, the model is built for that.

    Raises:
        InputError: the file has no weights, or they do not fit the model.
    """
    content = read_content(file)
    if config is not None:
        pretrained_cfg, arguments = dict(config.pretrained_cfg), dict(config.model_args)
        outline = sketch(config, Held(count_tensors(content), stored_size(file)), **kwargs)
    else:
        found = timm.get_pretrained_cfg(timm_name)
        pretrained_cfg = {} if found is None else found.to_dict(remove_source=True, remove_null=True)
        arguments = {}
        with torch.device("meta"):
            outline = timm.create_model(timm_name, pretrained=False, **kwargs)
    reading = find_weights(str(file), content, outline)
    if reading is None:
        raise no_weights(file)
    check_stored(file, reading.state)
    check_numbers(str(file), reading.state, outline)
    reading = replace(reading, state=without_zero_biases(file, reading.state, outline))
    reading, n_classes = _classes_of(timm_name, file, reading, pretrained_cfg.get("classifier") or "head")
    usual, wanted = arguments.get("num_classes", pretrained_cfg.get("num_classes")), kwargs.get("num_classes")
    arguments |= kwargs
    if n_classes is not None:
        if wanted not in (None, 0, n_classes):
            raise InputError(f"{file} has {n_classes} classes, not {wanted}: leave num_classes out of `model_kwargs`")
        pretrained_cfg["num_classes"] = n_classes
        arguments["num_classes"] = n_classes if wanted is None else wanted
        if usual and n_classes != usual:
            classes = f"a classifier of {n_classes} classes" if n_classes else "no classifier"
            log.info("the weights %s have %s, as the model now has; %s usually has %d classes", file, classes, timm_name, usual)
    check_channels(str(file), reading.shapes, outline, asked="in_chans" in kwargs)
    if (held := channels(reading.shapes, outline)) is not None and "input_size" in pretrained_cfg:
        pretrained_cfg["input_size"] = (held, *pretrained_cfg["input_size"][1:])  # timm adapts the first layer from these
    arguments |= _own_size(str(file), reading.shapes, outline, img_size)
    if fitting is not None and patches_of(reading.shapes, outline) == count_patches(outline, fitting):
        arguments["img_size"] = fitting
    architecture = config.architecture if config is not None else timm_name
    try:
        model = timm.create_model(
            architecture,
            pretrained=True,
            pretrained_cfg=pretrained_cfg | {"state_dict": reading.state},
            **arguments,
        )
    except (InputError, MemoryError):
        raise
    except Exception as error:  # torch and timm raise various errors on weights that do not fit
        raise InputError(do_not_fit(name, architecture, file, reading, arguments, outline, error)) from error
    model.pretrained_cfg.pop("state_dict", None)
    say_changes(str(file), reading.shapes, model, asked=img_size is not None)
    return model, reading


def _classes_of(timm_name: str, file: Path, reading: Reading, classifier: str | Sequence[str]) -> tuple[Reading, int | None]:
    """The number of classes of a reading's classifier, and the reading without a projection head in the classifier's place.

    The number is None if the file is in a format whose classifier only timm finds.
    """
    place = classifier if isinstance(classifier, str) else classifier[0]
    if f"{place}.weight" in reading.shapes:
        return reading, reading.shapes[f"{place}.weight"][0]
    if PATCHES not in reading.shapes:
        return reading, None
    projection = [name for name in reading.state if name.startswith(f"{place}.")]
    if projection:
        log.warning("the weights %s have no classifier: their %s are left out", file, some(projection))
    state = {name: tensor for name, tensor in reading.state.items() if name not in projection}
    shapes = {name: shape for name, shape in reading.shapes.items() if name not in projection}
    return replace(reading, state=state, shapes=shapes), 0


def _stored_config(timm_name: str) -> TimmConfig | None:
    """The configuration of a folder or repository; None for a model of timm's own."""
    if not timm_name.startswith((LOCAL, HUB)):
        return None
    folder = Path(timm_name.removeprefix(LOCAL)) if timm_name.startswith(LOCAL) else fetch_config(timm_name)
    return read_transformers(folder) if is_transformers(folder) else read_config(folder)


def _check_positions(checkpoint: Path, reading: Reading, model: Any) -> None:
    """Refuses weights whose position embedding was already resized, since it would be resized a second time."""
    patches = model.patch_embed.num_patches
    positions = reading.shapes.get(POSITIONS, ())
    held = positions[1] if len(positions) == 3 else patches
    if held not in (patches, patches + 1, patches + model.num_prefix_tokens):
        raise InputError(
            f"{checkpoint} holds {held} positions, not those of {patches} patches, so it was resized already: "
            f"use `pos_resample='timm'`"
        )


def resolved_preprocessing(model: Any, img_size: ImageSize | None) -> Preprocessing:
    """The preprocessing that timm recommends for a model.

    The image size is ``img_size``. If that is None, it is timm's test size, or the size that the model was built for if that
    differs from the pretrained size.

    Raises:
        InputError: the model does not take images of that size, or takes some of more channels than image files have.
    """
    built = tuple(get_model_input_config(model)["input_size"])
    published = tuple(model.pretrained_cfg.get("input_size", built))
    args: dict[str, Any] = {} if img_size is None else {"img_size": img_size}
    if img_size is None and built != published:
        args = {"input_size": built}
    return _preprocessing(model, args)


def _preprocessing(model: Any, args: dict[str, Any]) -> Preprocessing:
    try:
        found = Preprocessing.from_timm(resolve_input_data_config(model, args, use_test_size=True))
    except InputError:
        raise
    except Exception as error:  # a stored configuration may hold anything
        raise InputError(f"this {type(model).__name__} takes no such images: {one_line(error, 150)}") from error
    published = model.pretrained_cfg.get("mean")  # a stored configuration may hold anything
    if isinstance(published, Sequence) and len(published) not in (1, found.channels):
        log.info("mean and std are averages, for images of %d channels: set others with `mean` and `std`", found.channels)
    return found
