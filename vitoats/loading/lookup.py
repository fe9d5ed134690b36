"""Checks the name of a timm model, folder or repository before anything is read, and suggests names similar to a wrong one."""

import difflib
import re
from pathlib import Path

import vitoats.common.torchvision_ops  # noqa: F401  (before timm)
from vitoats.common.errors import InputError
from vitoats.common.json_files import read_json
from vitoats.loading.names import EMBEDDED, HUB_NAMES
from vitoats.loading.timm_config import CONFIG
from vitoats.loading.weights import weights_file

import timm  # isort: skip


def check_name(name: str, timm_name: str, needs_weights: bool) -> None:
    """Checks a model name.

    Args:
        name: the name that the user gave, for error messages.
        timm_name: the corresponding name in timm.
        needs_weights: whether a folder must contain weights.

    Raises:
        InputError: the model or folder does not exist, or the name is malformed.
    """
    if timm_name.startswith("hf-hub:"):
        if not re.fullmatch(r"hf-hub:[\w.-]+/[\w.-]+(@[\w./-]+)?", timm_name):
            raise InputError(f"{name!r} is no repository on the Hub: use hf-hub:owner/name")
        return
    if timm_name.startswith("local-dir:"):
        check_folder(Path(timm_name.removeprefix("local-dir:")), needs_weights)
        return
    architecture, _, tag = timm_name.partition(".")
    if not timm.is_model(architecture):
        raise InputError(f"unknown model {name!r}: {nearest(name, [*HUB_NAMES, EMBEDDED, *timm.list_models()])}")
    tags = [n.partition(".")[2] for n in timm.list_pretrained(architecture + ".*")]
    if tag and tag not in tags:
        raise InputError(
            f"{architecture} has no weights tagged {tag!r}: {nearest(name, [f'{architecture}.{t}' for t in tags])}"
        )


def check_folder(folder: Path, needs_weights: bool) -> None:
    """Checks that timm can open a folder with ``local-dir:``.

    Raises:
        InputError: the folder has no configuration, no weights, or holds a compressed model.
    """
    remedy = "give local-dir: a folder that timm saved"
    if not (folder / CONFIG).is_file() and (folder / "open_clip_config.json").is_file():
        raise InputError(
            f"{folder} holds a model of open_clip: give its weights with `checkpoint` FILE, and `model` the name of its image "
            f"tower in timm, such as vit_base_patch32_clip_224"
        )
    if not (folder / CONFIG).is_file():
        raise InputError(f"{folder} is no timm model folder (it has no config.json): {remedy}")
    about = folder / "vitoats.json"
    said = read_json(about) if about.is_file() else {}
    if isinstance(said, dict) and said.get("format") == "factored":
        raise InputError(f"{folder} holds a compressed model, which timm cannot open: use `model` {folder}, without local-dir:")
    if needs_weights and weights_file(folder) is None:
        raise InputError(f"{folder} holds no weights: copy model.safetensors there, or give `checkpoint`")


def nearest(name: str, names: list[str]) -> str:
    """The advice for a wrong name: similar names, or else the kinds of valid names."""
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
    return (
        f"did you mean {' or '.join(near)}?"
        if near
        else "use a timm name, a dinov2_ name, hf-hub:owner/name or local-dir:/path"
    )
