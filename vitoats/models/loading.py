"""From a name, a folder or a file to a model with its preprocessing."""

import difflib
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import safetensors
import torch
from torch import nn

import vitoats.torchvision_ops  # noqa: F401  (before timm)
from vitoats.data.transforms import Preprocessing
from vitoats.errors import InputError
from vitoats.models import embedded
from vitoats.models.heads import LinearHeadClassifier, attach_head
from vitoats.models.names import DINOV2, EMBEDDED, EMBEDDED_IMG_SIZE, NamedModel

import timm  # isort: skip
from timm.data.model_config import resolve_input_data_config  # isort: skip
from timm.models import load_state_dict  # isort: skip

EMBEDDED_HEAD = Path(__file__).parent.parent / "data" / "fashion_mnist_head.safetensors"


@dataclass
class LoadedModel:
    """A model ready for evaluation or compression.

    Attributes:
        name: the name that was asked for.
        model: images to logits, or to features where there is no head; in eval mode.
        preprocessing: what its images go through.
        weights: where its weights came from, in words.
        timm_model: the timm model inside (``model`` itself, or the backbone under a linear head).
    """

    name: str
    model: nn.Module
    preprocessing: Preprocessing
    weights: str

    @property
    def timm_model(self) -> nn.Module:
        return self.model.backbone if isinstance(self.model, LinearHeadClassifier) else self.model


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
) -> LoadedModel:
    """Loads a model by name.

    Args:
        name: a hub-style DINOv2 name, ``dinov2s_derived``, a timm name (``arch`` or ``arch.tag``), ``hf-hub:owner/name``,
            ``local-dir:/path``, or a folder that ``compress`` wrote.
        checkpoint: a .pth or .safetensors file with the weights, instead of those the name stands for.
        random_weights: build the architecture with random weights; nothing is fetched.
        img_size: in pixels; the model's usual size where None.
        crop_mode: "center", "squash" (resize both sides, as the OATS paper does) or "border"; the model's own where None.
        head: a linear head file for a backbone without one.
        head_layers: for a head file that does not say how many layers it takes.
        with_head: put the linear head that belongs to ``dinov2s_derived`` or to a folder on the backbone.

    Raises:
        InputError: unknown name, weights that are missing or do not fit, or settings the model does not take.
    """
    if ("/" in name and not name.startswith(("hf-hub:", "local-dir:"))) or name in (".", "..") or Path(name).is_dir():
        folder = Path(name)
        loaded = _load_folder(folder, img_size)
        own_head = folder / "head.safetensors"
    elif name == EMBEDDED:
        if checkpoint is not None:
            raise InputError(f"{EMBEDDED} has weights of its own: leave --checkpoint out, or use --model dinov2_vits14")
        size = img_size or EMBEDDED_IMG_SIZE
        loaded = LoadedModel(name, embedded.load_backbone(size), Preprocessing(img_size=size, crop_pct=1.0), _EMBEDDED_WEIGHTS)
        own_head = EMBEDDED_HEAD
    else:
        own_head = None
        loaded = _load_timm(name, checkpoint, random_weights, img_size)
    if head is None and with_head and own_head is not None and own_head.is_file():
        head = own_head
    if crop_mode is not None:
        loaded.preprocessing = loaded.preprocessing.with_crop_mode(crop_mode)
    if head is not None:
        if loaded.timm_model.num_classes:
            raise InputError(f"{name} has a classifier of its own: leave --head out")
        loaded.model = attach_head(loaded.timm_model, head, head_layers)
    loaded.model.eval().requires_grad_(False)
    _check_finite(loaded)
    return loaded


_EMBEDDED_WEIGHTS = f"DINOv2-S-derived, from the package {embedded.PACKAGE} {embedded.PACKAGE_VERSION}"


def _load_folder(folder: Path, img_size: int | None) -> LoadedModel:
    from vitoats.checkpoint import is_checkpoint, load_checkpoint

    if not folder.is_dir():
        raise InputError(f"there is no model folder {folder}: use a folder that compress wrote, or hf-hub:{folder} for the Hub")
    if not is_checkpoint(folder):
        raise InputError(
            f"{folder} was not written by compress (it has no vitoats.json): for a timm folder use local-dir:{folder}"
        )
    loaded = load_checkpoint(folder)
    if img_size is not None and img_size != loaded.preprocessing.img_size:
        raise InputError(
            f"{folder} was compressed for {loaded.preprocessing.img_size} px: leave --img-size out, or compress again"
        )
    return loaded


def _load_timm(name: str, checkpoint: Path | None, random_weights: bool, img_size: int | None) -> LoadedModel:
    named = DINOV2.get(name)
    timm_name = named.timm_name if named else name
    _check_name(name, timm_name)
    kwargs: dict[str, Any] = {}
    img_size = img_size or (named.img_size if named else None)
    if img_size is not None:
        kwargs["img_size"] = img_size
    if random_weights:
        weights = "random weights"
        kwargs["pretrained"] = False
    elif checkpoint is not None:
        weights = str(checkpoint)
        state = read_weights(checkpoint)
        overlay: dict[str, Any] = {"state_dict": state}
        n_classes = _classes_of(state)
        if n_classes and not timm_name.startswith("local-dir:"):
            overlay["num_classes"] = kwargs["num_classes"] = n_classes
        kwargs |= {"pretrained": True, "pretrained_cfg_overlay": overlay}
    else:
        weights = _announce_fetch(name, timm_name, named)
        kwargs["pretrained"] = True
    try:
        model = timm.create_model(timm_name, **kwargs)
    except (OSError, InputError) as error:
        raise _cannot_fetch(name, timm_name, named, error) if checkpoint is None else error from None
    except (RuntimeError, KeyError, ValueError, AssertionError, TypeError) as error:
        raise InputError(_explain(name, checkpoint, img_size, error)) from None
    model.pretrained_cfg.pop("state_dict", None)
    size = {"img_size": img_size} if img_size else {}
    config = resolve_input_data_config(model, args=size | ({"crop_pct": named.crop_pct} if named else {}))
    return LoadedModel(name, model, Preprocessing.from_timm(config), weights)


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Reads the tensors of a checkpoint: EMA weights first, prefixes of wrappers stripped, no pickled code run.

    Raises:
        InputError: no such file, or it is no checkpoint that can be read safely.
    """
    if not path.is_file():
        raise InputError(f"there is no checkpoint file {path}: give --checkpoint a .pth or .safetensors file")
    try:
        return dict(load_state_dict(str(path)))
    except (
        safetensors.SafetensorError,
        RuntimeError,
        OSError,
        ValueError,
        EOFError,
        KeyError,
        TypeError,
        AttributeError,
    ) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"{path} cannot be read as weights ({reason}): "
            f"give --checkpoint a .safetensors file, or a .pth that holds tensors only"
        ) from None
    except Exception as error:  # pickle.UnpicklingError and its like, which have no base class of their own
        raise InputError(
            f"{path} cannot be read as weights ({type(error).__name__}): convert it to .safetensors first"
        ) from None


def _check_name(name: str, timm_name: str) -> None:
    if timm_name.startswith("hf-hub:"):
        return
    if timm_name.startswith("local-dir:"):
        folder = Path(timm_name.removeprefix("local-dir:"))
        if not (folder / "config.json").is_file():
            raise InputError(
                f"{folder} is no timm model folder (it has no config.json): give local-dir: a folder that timm saved"
            )
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


def _classes_of(state: dict[str, torch.Tensor]) -> int | None:
    """The class count of a fine-tuned classifier, from its head."""
    weight = state.get("head.weight")
    return weight.shape[0] if weight is not None and weight.ndim == 2 else None


def _announce_fetch(name: str, timm_name: str, named: NamedModel | None) -> str:
    """Says where weights are about to come from, and fails at once where that cannot work.

    Returns:
        the source in words.
    """
    import logging

    log = logging.getLogger("vitoats")
    if timm_name.startswith("local-dir:"):
        return timm_name
    if timm_name.startswith("hf-hub:"):
        repo, filename = timm_name.removeprefix("hf-hub:").partition("@")[0], "config.json"
    else:
        config = timm.get_pretrained_cfg(timm_name)
        if config is None or not config.has_weights:
            raise InputError(
                f"timm has no weights for {name}: give them with --checkpoint FILE, or use --random-weights for a dry run"
            )
        if not config.hf_hub_id:
            log.info("fetching the weights of %s from %s", name, config.url or config.file)
            return str(config.url or config.file)
        repo, filename = config.hf_hub_id, config.hf_hub_filename or "model.safetensors"
        if repo.endswith("/"):
            repo += f"{config.architecture}.{config.tag}" if config.tag else str(config.architecture)

    from huggingface_hub import constants, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(repo, filename), str):
        log.info("using the cached weights of %s (%s)", name, repo)
    else:
        if not _reachable(constants.ENDPOINT):
            raise _cannot_fetch(name, timm_name, named, OSError(f"{urlparse(constants.ENDPOINT).hostname} cannot be reached"))
        log.info("fetching the weights of %s from the Hugging Face Hub (%s)", name, repo)
    return f"{repo} on the Hugging Face Hub"


def _reachable(endpoint: str) -> bool:
    """Whether a connection opens; True behind a proxy, where only the client itself can tell."""
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        return False
    if any(os.environ.get(v) for v in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")):
        return True
    url = urlparse(endpoint)
    try:
        socket.create_connection((url.hostname, url.port or (443 if url.scheme == "https" else 80)), timeout=10).close()
        return True
    except OSError:
        return False


def _cannot_fetch(name: str, timm_name: str, named: NamedModel | None, error: Exception) -> InputError:
    file = named.weights_file if named else "model.safetensors"
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return InputError(
        f"the weights of {name} ({file} of {timm_name}) cannot be fetched: {reason}; "
        f"give the file with --checkpoint FILE, or a timm folder with --model local-dir:PATH"
    )


def _explain(name: str, checkpoint: Path | None, img_size: int | None, error: Exception) -> str:
    """One line out of timm's or torch's many."""
    text = " ".join(str(error).split()) or type(error).__name__
    if checkpoint is not None or "state_dict" in text:
        text = text if len(text) < 300 else text[:300] + "..."
        return f"the weights {checkpoint or ''} do not fit {name}: {text}; use the model they were made for"
    if img_size is not None and "img_size" in text:
        return f"{name} takes no --img-size {img_size}: leave --img-size out ({text})"
    return f"{name} cannot be built: {text}"


def _check_finite(loaded: LoadedModel) -> None:
    for key, tensor in loaded.model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise InputError(f"the weight {key} of {loaded.name} is not finite (NaN or Inf): load another checkpoint")
