"""Access to the Hugging Face Hub: every download is announced first, and results are local files and folders."""

import logging
import os
import urllib.error
import urllib.request
from pathlib import Path

import vitoats.common.torchvision_ops  # noqa: F401  (before timm)
from vitoats.common.errors import InputError, one_line
from vitoats.common.file_digests import files_sha256
from vitoats.common.noted import note
from vitoats.loading.names import ON_HUB, NamedModel
from vitoats.loading.shards import INDEX, shard_names

import timm  # isort: skip

log = logging.getLogger("vitoats")

COMPRESSED = ("config.json", "vitoats.json", "model.safetensors", "head.safetensors")  # files of a compressed folder
TRANSFORMERS = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")  # files of a transformers folder; no code, no pickle
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # in a timm repository, in timm's order of preference


class WeightsUnavailableError(InputError):
    """A model's weights cannot be fetched. If only shapes matter, random weights can be used instead."""


def announce_fetch(name: str, timm_name: str, named: NamedModel | None) -> str:
    """Logs the source of a model's weights, and fails early if they are unavailable.

    Returns:
        the source in words.

    Raises:
        InputError: timm has no weights for the model.
        WeightsUnavailableError: the weights are not cached and the Hub cannot be reached.
    """
    if timm_name.startswith("local-dir:"):
        return timm_name
    if timm_name.startswith("hf-hub:"):
        (repo, revision), filename = _split(timm_name), "config.json"
    else:
        config, revision = timm.get_pretrained_cfg(timm_name), None
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

    if isinstance(try_to_load_from_cache(repo, filename, revision=revision), str):
        log.info("using the cached weights of %s (%s)", name, repo)
    else:
        reason = unreachable(constants.ENDPOINT)
        if reason:
            raise cannot_fetch(name, repo, named, reason)
        log.info("fetching the weights of %s from the Hugging Face Hub (%s)", name, repo)
    return f"{repo}{ON_HUB}"


def hub_folder(name: str) -> Path | None:
    """The local copy of a compressed folder on the Hub, which is fetched if it is not cached.

    Args:
        name: hf-hub:owner/name, with or without @revision.

    Returns:
        the folder; None if the repository is unavailable or does not hold a compressed folder, so that the caller can try to
        open it as a timm model.
    """
    from huggingface_hub import constants, hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    repo, revision = _split(name)
    from_cache = bool(unreachable(constants.ENDPOINT))
    try:
        hf_hub_download(repo, "vitoats.json", revision=revision, local_files_only=from_cache)
        log.info("%s %s from the Hugging Face Hub", "using the cached copy of" if from_cache else "fetching", repo)
        folder = snapshot_download(repo, revision=revision, allow_patterns=list(COMPRESSED), local_files_only=from_cache)
    except (EntryNotFoundError, HfHubHTTPError):
        return None
    _note(name, Path(folder))
    return Path(folder)


def fetch_transformers_folder(name: str) -> Path:
    """The local copy of a transformers model on the Hub, hf-hub:owner/name with or without @revision; code is not fetched.

    Raises:
        WeightsUnavailableError: it is not cached and cannot be fetched.
    """
    from huggingface_hub import constants, snapshot_download

    repo, revision = _split(name)
    reason = unreachable(constants.ENDPOINT)
    try:
        log.info("%s %s from the Hugging Face Hub", "using the cached copy of" if reason else "fetching", repo)
        folder = snapshot_download(repo, revision=revision, allow_patterns=list(TRANSFORMERS), local_files_only=bool(reason))
    except (OSError, ValueError) as error:
        raise WeightsUnavailableError(
            f"{repo} cannot be fetched ({reason or one_line(error, 150)}): give `model` a transformers folder, local-dir:PATH"
        ) from None
    _note(name, Path(folder))
    return Path(folder)


def _note(name: str, folder: Path) -> None:
    note(lambda: {f"files of {name}": files_sha256(folder.iterdir())})


def fetch_config(name: str) -> Path:
    """The local folder with the config.json of hf-hub:owner/name, with or without @revision."""
    from huggingface_hub import try_to_load_from_cache

    repo, revision = _split(name)
    if not isinstance(try_to_load_from_cache(repo, "config.json", revision=revision), str):
        log.info("fetching the configuration of %s from the Hugging Face Hub", repo)
    return _fetch(name, "config.json").parent


def reachable_config(name: str) -> Path | None:
    """Like ``fetch_config``; None if the repository has none, or the Hub cannot be reached and it is not cached."""
    from huggingface_hub import constants, try_to_load_from_cache

    repo, revision = _split(name)
    if not isinstance(try_to_load_from_cache(repo, "config.json", revision=revision), str) and unreachable(constants.ENDPOINT):
        return None
    try:
        return fetch_config(name)
    except (OSError, ValueError):
        return None


def fetch_weights(name: str) -> Path:
    """The local file with the weights of hf-hub:owner/name, with or without @revision, or the index of several."""
    from huggingface_hub.errors import EntryNotFoundError

    for file in WEIGHTS:
        try:
            return _fetch(name, file)
        except EntryNotFoundError:
            continue
    index = _fetch(name, INDEX)
    for shard in shard_names(index):
        _fetch(name, shard)
    return index


def _fetch(name: str, file: str) -> Path:
    from huggingface_hub import hf_hub_download

    repo, revision = _split(name)
    return Path(hf_hub_download(repo, file, revision=revision))


def _split(name: str) -> tuple[str, str | None]:
    """owner/name and revision of hf-hub:owner/name@revision."""
    repo, _, revision = name.removeprefix("hf-hub:").partition("@")
    return repo, revision or None


def unreachable(endpoint: str) -> str:
    """The reason why a web address cannot be reached, or "" if it can; uses the proxy, if one is set."""
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        return "HF_HUB_OFFLINE is set"
    try:
        urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=10).close()
    except urllib.error.HTTPError:
        return ""  # the server answers
    except (OSError, ValueError) as error:
        return f"the Hub cannot be reached ({one_line(error, 100)})"
    return ""


def cannot_fetch(name: str, repo: str, named: NamedModel | None, reason: str) -> WeightsUnavailableError:
    """The error for unavailable weights; it names the file and the arguments that provide it."""
    file = named.weights_file if named else f"model.safetensors of {repo}"
    return WeightsUnavailableError(
        f"the weights of {name} ({file}) cannot be fetched: {reason}; "
        f"give the file with `checkpoint`, or a timm folder with `model` local-dir:PATH"
    )
