"""From a name, a folder or a file to a model with its preprocessing."""

import difflib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import nn

import vitoats.common.torchvision_ops  # noqa: F401  (before timm)
from vitoats.common.errors import InputError
from vitoats.data.transforms import Preprocessing
from vitoats.loading import embedded
from vitoats.loading.names import DINOV2, EMBEDDED, EMBEDDED_IMG_SIZE, ON_HUB
from vitoats.loading.weights import announce_fetch, cannot_fetch, check_folder, hub_folder, one_line, read_weights
from vitoats.models.heads import LinearHeadClassifier, attach_head
from vitoats.models.inputs import ImageInputs
from vitoats.models.positions import set_image_size

import timm  # isort: skip
from timm.data.model_config import resolve_input_data_config  # isort: skip

EMBEDDED_HEAD = Path(__file__).parent.parent / "data" / "fashion_mnist_head.safetensors"


@dataclass
class LoadedModel:
    """A model ready for evaluation or compression.

    Attributes:
        name: the name that was asked for.
        model: images to logits, or to features where there is no classifier; in eval mode.
        preprocessing: what its images go through.
        weights: where its weights came from, in words.
        about: what vitoats.json says of a model that compress wrote; empty for others.
    """

    name: str
    model: nn.Module
    preprocessing: Preprocessing
    weights: str
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def source(self) -> str:
        """The name of the model before it was compressed; ``name`` where it was not."""
        return self.about.get("model", self.name)

    @property
    def timm_model(self) -> Any:
        """The timm model inside: ``model`` itself, or the backbone under a linear head."""
        return self.model.backbone if isinstance(self.model, LinearHeadClassifier) else self.model

    @property
    def inputs(self) -> ImageInputs:
        """What the model takes."""
        return ImageInputs(self.preprocessing.img_size)

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of the outputs; empty where its head does not say them."""
        return self.model.info.classes if isinstance(self.model, LinearHeadClassifier) else ()

    @property
    def n_classes(self) -> int:
        """How many classes its outputs are logits of; 0 where they are features."""
        return self.model.head.out_features if isinstance(self.model, LinearHeadClassifier) else self.timm_model.num_classes


def load_model(
    name: str,
    *,
    checkpoint: Path | None = None,
    random_weights: bool = False,
    img_size: int | None = None,
    crop_mode: str | None = None,
    head: Path | None = None,
    head_layers: int | None = None,
    with_head: bool = True,
    pos_resample: str | None = None,
) -> LoadedModel:
    """Loads a model by name.

    Args:
        name: a hub-style DINOv2 name, ``dinov2s_derived``, a timm name (``arch`` or ``arch.tag``), ``hf-hub:owner/name``,
            ``local-dir:/path``, or a folder that ``compress`` wrote, on disk or on the Hub.
        checkpoint: a .pth or .safetensors file with the weights, instead of those the name stands for.
        random_weights: build the architecture with random weights; nothing is fetched.
        img_size: in pixels; the model's usual size where None.
        crop_mode: "center", "squash" (resize both sides, as the OATS paper does) or "border"; the model's own where None.
        head: a linear head file for a backbone without one.
        head_layers: for a head file that does not say how many layers it takes.
        with_head: put the linear head that belongs to ``dinov2s_derived`` or to a folder on the backbone.
        pos_resample: how the position embedding is resized (``vitoats.models.positions``): "official" by default for
            hub-style DINOv2 names, "timm" for others.

    Raises:
        InputError: unknown name, weights that are missing or do not fit, or settings the model does not take.
    """
    if not name:
        raise InputError("no model is named: give `model` a timm name, a dinov2_ name or a folder")
    if img_size is not None and img_size < 1:
        raise InputError(f"an image of {img_size} px cannot be: give `img_size` a positive number")
    own_head = None
    if ("/" in name and not name.startswith(("hf-hub:", "local-dir:"))) or Path(name).is_dir():
        _refuse_other_weights(f"{name} has its own weights", checkpoint, random_weights, pos_resample)
        loaded = _load_folder(Path(name), img_size)
        own_head = Path(name) / "head.safetensors"
    elif folder := _hub_folder(name, checkpoint, random_weights):
        loaded = _load_folder(folder, img_size)
        loaded.name, loaded.weights = name, f"{name.removeprefix('hf-hub:')}{ON_HUB}"
        own_head = folder / "head.safetensors"
    elif name == EMBEDDED:
        reason = f"{EMBEDDED} has its own weights (other ones go with dinov2_vits14)"
        _refuse_other_weights(reason, checkpoint, random_weights, pos_resample)
        size = img_size or EMBEDDED_IMG_SIZE
        loaded = LoadedModel(name, embedded.load_backbone(size), Preprocessing(img_size=size, crop_pct=1.0), _EMBEDDED_WEIGHTS)
        own_head = EMBEDDED_HEAD
    else:
        loaded = _load_timm(name, checkpoint, random_weights, img_size, pos_resample)
    if crop_mode is not None:
        loaded.preprocessing = loaded.preprocessing.with_crop_mode(crop_mode)
    _check_finite(loaded)
    if head is None and with_head and own_head is not None and own_head.is_file():
        head = own_head
    if head is not None:
        if loaded.n_classes:
            raise InputError(f"{name} has a classifier of its own: leave `head` out")
        size = loaded.preprocessing.img_size
        loaded.model = attach_head(loaded.timm_model, head, head_layers, source=loaded.source, img_size=size)
    loaded.model.eval().requires_grad_(False)
    return loaded


_EMBEDDED_WEIGHTS = f"DINOv2-S-derived, from the package {embedded.PACKAGE} {embedded.PACKAGE_VERSION}"


def _refuse_other_weights(reason: str, checkpoint: Path | None, random_weights: bool, pos_resample: str | None) -> None:
    given = {"checkpoint": checkpoint is not None, "random_weights": random_weights, "pos_resample": pos_resample is not None}
    for argument, is_given in given.items():
        if is_given:
            raise InputError(f"{reason}: leave `{argument}` out")


def _hub_folder(name: str, checkpoint: Path | None, random_weights: bool) -> Path | None:
    """The local copy of a folder on the Hub, None where the name or the flags ask for something else."""
    if not name.startswith("hf-hub:") or checkpoint is not None or random_weights:
        return None
    _check_name(name, name, needs_weights=True)
    return hub_folder(name)


def _load_folder(folder: Path, img_size: int | None) -> LoadedModel:
    from vitoats.loading.checkpoint import is_checkpoint, load_checkpoint

    if not folder.is_dir():
        hub = "" if folder.is_absolute() else f", or hf-hub:{folder} for the Hub"
        raise InputError(f"there is no model folder {folder}: use a folder that compress wrote{hub}")
    if not is_checkpoint(folder):
        raise InputError(
            f"{folder} was not written by compress (it has no vitoats.json): for a timm folder use local-dir:{folder}"
        )
    loaded = load_checkpoint(folder)
    if img_size is not None and img_size != loaded.preprocessing.img_size:
        raise InputError(
            f"{folder} was compressed for {loaded.preprocessing.img_size} px: leave `img_size` out, or compress again"
        )
    return loaded


def _load_timm(
    name: str, checkpoint: Path | None, random_weights: bool, img_size: int | None, pos_resample: str | None
) -> LoadedModel:
    named = DINOV2.get(name)
    timm_name = named.timm_name if named else name
    img_size = img_size or (named.img_size if named else None)
    way = pos_resample or ("official" if named else "timm")
    _check_name(name, timm_name, needs_weights=not random_weights and checkpoint is None)
    # timm resizes positions as it loads them; to do it in another way, they are loaded at their own size first
    kwargs = {} if img_size is None or way != "timm" else {"img_size": img_size}
    try:
        if random_weights:
            weights = "random weights"
            with torch.random.fork_rng():
                torch.manual_seed(0)  # the same ones each time
                model = timm.create_model(timm_name, pretrained=False, **kwargs)
        elif checkpoint is not None:
            weights = str(checkpoint)
            state = read_weights(checkpoint)
            model = _create_with(timm_name, state, kwargs)
            if way != "timm" and img_size is not None:
                _check_positions(checkpoint, state, model)
        else:
            weights = announce_fetch(name, timm_name, named)
            model = timm.create_model(timm_name, pretrained=True, **kwargs)
    except InputError:
        raise
    except safetensors.SafetensorError as error:
        raise InputError(f"model.safetensors of {name} is damaged ({one_line(error, 100)}): copy the folder again") from None
    except OSError as error:
        raise cannot_fetch(name, timm_name, named, one_line(error, 150)) from None
    except (RuntimeError, KeyError, ValueError, AssertionError, TypeError, ZeroDivisionError) as error:
        raise InputError(_explain(name, checkpoint, img_size, error)) from None
    _check_img_size(name, model, img_size)
    if way != "timm" and img_size is not None:
        if getattr(model, "pos_embed", None) is None or not hasattr(model, "no_embed_class"):
            raise InputError(f"{name} has no position embedding of its own to resize: leave `pos_resample` out")
        set_image_size(model, img_size, way)
        weights += f", positions resized as in {way}"
    args = ({} if img_size is None else {"img_size": img_size}) | ({"crop_pct": named.crop_pct} if named else {})
    return LoadedModel(
        name, model, Preprocessing.from_timm(resolve_input_data_config(model, args, use_test_size=True)), weights
    )


def _create_with(timm_name: str, state: dict[str, torch.Tensor], kwargs: dict[str, Any]) -> nn.Module:
    """A timm model with the given weights, converted by timm as it converts those of the architecture.

    The class count is that of the weights: of their classifier, or 0 where native weights have none.
    """
    source, _, path = timm_name.partition(":")
    arguments: dict[str, Any] = {}
    if source in ("local-dir", "hf-hub"):
        from timm.models._hub import load_model_config_from_hf, load_model_config_from_path

        config, timm_name, arguments = (load_model_config_from_path if source == "local-dir" else load_model_config_from_hf)(
            path
        )
        config = {k: v for k, v in config.items() if k not in ("file", "source", "url", "hf_hub_id")}
    else:
        found = timm.get_pretrained_cfg(timm_name)
        config = {} if found is None else found.to_dict(remove_source=True, remove_null=True)
    classifier = config.get("classifier") or "head"
    key = f"{classifier if isinstance(classifier, str) else classifier[0]}.weight"
    if key in state:
        arguments["num_classes"] = config["num_classes"] = state[key].shape[0]
    elif "patch_embed.proj.weight" in state and "mask_token" not in state:
        arguments["num_classes"] = config["num_classes"] = 0
    config["state_dict"] = state
    model = timm.create_model(timm_name, pretrained=True, pretrained_cfg=config, **(arguments | kwargs))
    model.pretrained_cfg.pop("state_dict", None)
    return model


def _check_name(name: str, timm_name: str, needs_weights: bool) -> None:
    if timm_name.startswith("hf-hub:"):
        if not re.fullmatch(r"hf-hub:[\w.-]+/[\w.-]+(@[\w./-]+)?", timm_name):
            raise InputError(f"{name!r} is no repository on the Hub: use hf-hub:owner/name")
        return
    if timm_name.startswith("local-dir:"):
        check_folder(Path(timm_name.removeprefix("local-dir:")), needs_weights)
        return
    architecture, _, tag = timm_name.partition(".")
    if not timm.is_model(architecture):
        raise InputError(f"unknown model {name!r}: {_nearest(name, [*DINOV2, EMBEDDED, *timm.list_models()])}")
    tags = [n.partition(".")[2] for n in timm.list_pretrained(architecture + ".*")]
    if tag and tag not in tags:
        raise InputError(
            f"{architecture} has no weights tagged {tag!r}: {_nearest(name, [f'{architecture}.{t}' for t in tags])}"
        )


def _nearest(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
    return (
        f"did you mean {' or '.join(near)}?"
        if near
        else "use a timm name, a dinov2_ name, hf-hub:owner/name or local-dir:/path"
    )


def _explain(name: str, checkpoint: Path | None, img_size: int | None, error: Exception) -> str:
    """One line out of timm's or torch's many."""
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
    if img_size is not None and patch and img_size % patch[0]:
        raise InputError(f"{name} takes image sizes that are multiples of {patch[0]}, not {img_size}: change `img_size`")


def _check_positions(checkpoint: Path, state: dict[str, torch.Tensor], model: Any) -> None:
    """Refuses weights whose position embedding was resized already: what follows would resize it a second time."""
    patches = model.patch_embed.num_patches
    held = state["pos_embed"].shape[1] if "pos_embed" in state and state["pos_embed"].ndim == 3 else patches
    if held not in (patches, patches + 1, patches + model.num_prefix_tokens):
        raise InputError(
            f"{checkpoint} holds {held} positions, not those of {patches} patches, so it was resized already: "
            f"use `pos_resample='timm'`"
        )


def _check_finite(loaded: LoadedModel) -> None:
    for key, tensor in loaded.model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise InputError(f"the weight {key} of {loaded.name} is not finite (NaN or Inf): load another checkpoint")
