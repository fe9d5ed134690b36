"""Where weights come from: files that are read safely, and the Hugging Face Hub, said aloud and checked first."""

import json
import logging
import os
import urllib.error
import urllib.request
import warnings
from pathlib import Path
from typing import Any

import torch

import vitoats.common.torchvision_ops  # noqa: F401  (before timm)
from vitoats.common.errors import InputError
from vitoats.loading.names import ON_HUB, NamedModel

import timm  # isort: skip
from timm.models import load_state_dict  # isort: skip
from timm.models._hub import load_model_config_from_path  # isort: skip

log = logging.getLogger("vitoats")

WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pth", "*.pth.tar")  # what timm looks for in a folder


class WeightsUnavailableError(InputError):
    """A model's weights cannot be fetched. Where only its shapes matter, random ones can take their place."""


def one_line(error: Exception, limit: int = 300) -> str:
    """An error's message on one line, cut to ``limit`` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[:limit] + "..."


def read_weights(path: Path, field: str = "checkpoint") -> dict[str, torch.Tensor]:
    """Reads the tensors of a file: EMA weights first, prefixes of wrappers stripped, no pickled code run.

    Args:
        path: a .pth or .safetensors file.
        field: the argument that named it, for the error.

    Raises:
        InputError: no such file, or it holds no tensors that can be read safely.
    """
    if not path.is_file():
        raise InputError(f"there is no {field} file {path}: give `{field}` a .pth or .safetensors file")
    remedy = f"give `{field}` a .safetensors file, or a .pth that holds tensors only"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = load_state_dict(str(path), use_ema=field == "checkpoint")
    except Exception as error:  # each reader fails in its own way on a foreign file
        unsafe = "weights_only" in str(error)
        reason = "it holds pickled objects, which are never run" if unsafe else one_line(error, 150)
        raise InputError(f"{path} cannot be read as weights ({reason}): {remedy}") from None
    if not isinstance(state, dict) or not state or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise InputError(f"{path} holds no weights by name: {remedy}")
    return dict(state)


def check_folder(folder: Path, needs_weights: bool) -> None:
    """Checks that timm can open a folder by ``local-dir:``.

    Raises:
        InputError: it has no configuration that timm understands, or no weights.
    """
    remedy = "give local-dir: a folder that timm saved"
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} is no timm model folder (it has no config.json): {remedy}")
    about = folder / "vitoats.json"
    if about.is_file() and '"format": "factored"' in about.read_text(errors="replace"):
        raise InputError(f"{folder} holds a compressed model, which timm cannot open: use `model` {folder}, without local-dir:")
    try:
        architecture = load_model_config_from_path(folder)[1]
        known = timm.is_model(architecture)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise InputError(f"{folder}/config.json is no timm configuration ({one_line(error, 100)}): {remedy}") from None
    if not known:
        raise InputError(
            f"{folder}/config.json names the architecture {architecture!r}, which this timm does not have: update timm"
        )
    if needs_weights and not any(next(folder.glob(pattern), None) for pattern in WEIGHT_FILES):
        raise InputError(f"{folder} holds no weights: copy model.safetensors there, or give `checkpoint`")


def announce_fetch(name: str, timm_name: str, named: NamedModel | None) -> str:
    """Says where weights are about to come from, and fails at once where that cannot work.

    Returns:
        the source in words.

    Raises:
        InputError: there are no such weights.
        WeightsUnavailableError: they are not cached and the Hub cannot be reached.
    """
    if timm_name.startswith("local-dir:"):
        return timm_name
    if timm_name.startswith("hf-hub:"):
        repo, _, revision = timm_name.removeprefix("hf-hub:").partition("@")
        filename = "config.json"
    else:
        config, revision = timm.get_pretrained_cfg(timm_name), ""
        if config is None or not config.has_weights:
            raise InputError(
                f"timm has no weights for {name}: give them with `checkpoint`, or use `random_weights` for a dry run"
            )
        if not config.hf_hub_id:
            log.info("fetching the weights of %s from %s", name, config.url or config.file)
            return str(config.url or config.file)
        repo, filename = config.hf_hub_id, config.hf_hub_filename or "model.safetensors"
        if repo.endswith("/"):
            repo += f"{config.architecture}.{config.tag}" if config.tag else str(config.architecture)

    from huggingface_hub import constants, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(repo, filename, revision=revision or None), str):
        log.info("using the cached weights of %s (%s)", name, repo)
    else:
        reason = unreachable(constants.ENDPOINT)
        if reason:
            raise cannot_fetch(name, repo, named, reason)
        log.info("fetching the weights of %s from the Hugging Face Hub (%s)", name, repo)
    return f"{repo}{ON_HUB}"


def hub_folder(name: str) -> Path | None:
    """The local copy of a folder that compress wrote and that lies on the Hub, fetched where it is not cached yet.

    Args:
        name: hf-hub:owner/name, with or without @revision.

    Returns:
        None where the repository is another one, or is not to be had: its timm model is tried next.
    """
    from huggingface_hub import constants, hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    repo, _, revision = name.removeprefix("hf-hub:").partition("@")
    from_cache = bool(unreachable(constants.ENDPOINT))
    try:
        hf_hub_download(repo, "vitoats.json", revision=revision or None, local_files_only=from_cache)
        log.info("%s %s from the Hugging Face Hub", "using the cached copy of" if from_cache else "fetching", repo)
        folder = snapshot_download(
            repo,
            revision=revision or None,
            allow_patterns=["*.json", "*.safetensors"],
            local_files_only=from_cache,
        )
    except (EntryNotFoundError, HfHubHTTPError):
        return None
    return Path(folder)


def unreachable(endpoint: str) -> str:
    """Why a web address cannot be reached, "" where it can; through a proxy where one is set."""
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        return "HF_HUB_OFFLINE is set"
    try:
        urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=10).close()
    except urllib.error.HTTPError:
        return ""  # it answers
    except (OSError, ValueError) as error:
        return f"the Hub cannot be reached ({one_line(error, 100)})"
    return ""


def cannot_fetch(name: str, repo: str, named: NamedModel | None, reason: str) -> WeightsUnavailableError:
    """The error for weights that are not to be had; names the file and the flags that give it."""
    file = named.weights_file if named else f"model.safetensors of {repo}"
    return WeightsUnavailableError(
        f"the weights of {name} ({file}) cannot be fetched: {reason}; "
        f"give the file with `checkpoint`, or a timm folder with `model` local-dir:PATH"
    )


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
        InputError: it is damaged.
    """
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is damaged ({one_line(error, 100)}): copy or make the folder again") from None
