"""Loads causal language models by transformers: by name, from a folder, the Hub or memory. No code and no pickle is run."""

import copy
import logging
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

import vitoats.common.torchvision_ops  # noqa: F401  (before transformers, which imports torchvision)
from vitoats.common.errors import InputError, one_line
from vitoats.common.finite import check_weights
from vitoats.common.json_files import read_json
from vitoats.common.whole_files import check_regular
from vitoats.loading.hub import fetch_transformers_folder, reachable_config
from vitoats.loading.language_checkpoint import load_compressed
from vitoats.loading.language_on_disk import ModelOnDisk, open_on_disk
from vitoats.loading.loaded_text import IN_MEMORY, LoadedLanguageModel, Packing
from vitoats.loading.names import ON_HUB
from vitoats.loading.shards import tensor_files
from vitoats.loading.sketch import Held, no_more_than
from vitoats.loading.smollm2 import NAME, WEIGHTS, smollm2_folder
from vitoats.loading.timm_config import CONFIG
from vitoats.loading.weights import check_header, open_tensors

log = logging.getLogger("vitoats")

LOCAL, HUB = "local-dir:", "hf-hub:"
SEQ_LEN = 2048  # tokens of a window, unless the model has fewer positions
ABOUT = "vitoats.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
READ = (".json", ".model", ".txt", ".jinja")  # what transformers reads beside weights
COUNTS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
LARGEST_TEXT = 2**28  # bytes; the largest tokenizers take 35 MB
REGISTERED = 2  # times: transformers registers each tensor as it builds the model and as it reads the weights
REMEDY = "use a decoder (docs/language-models.md)"


def is_language_model(name: str, look_at_hub: bool = False) -> bool:
    """Whether a name stands for a model of transformers; that of a folder is told from a timm folder by its configuration.

    Args:
        name: as ``--model`` takes it.
        look_at_hub: fetch the configuration of a repository on the Hub; otherwise those are no language models.

    Raises:
        InputError: it is a GGUF file.
    """
    _refuse_gguf(name)
    if name == NAME:
        return True
    if name.startswith(HUB):
        return look_at_hub and _on_hub(name)
    return _is_transformers(Path(name.removeprefix(LOCAL)))


def _refuse_gguf(name: str) -> None:
    if name.endswith(".gguf"):
        raise InputError(f"{name} is a GGUF file, of which only smollm2's own is read: give `model` a folder of safetensors")


def _on_hub(name: str) -> bool:
    if not re.fullmatch(r"hf-hub:[\w.-]+/[\w.-]+(@[\w./-]+)?", name):
        return False
    folder = reachable_config(name)  # if there is none, loading it as a timm model gives the reason
    return folder is not None and _is_transformers(folder)


def _is_transformers(folder: Path) -> bool:
    if not (folder / CONFIG).is_file():
        return False
    try:
        said = read_json(folder / CONFIG)
    except InputError:
        return False
    return isinstance(said, dict) and {"model_type", "vocab_size"} <= said.keys() and "architecture" not in said


def load_language_model(name: str, seq_len: int | None = None, run_from_disk: str | None = None) -> LoadedLanguageModel:
    """Loads a causal language model in float32.

    Args:
        name: "smollm2", ``local-dir:/path``, ``hf-hub:owner/name``, or a folder that compress wrote.
        seq_len: tokens of a window; None for 2048. It is cut to the model's positions.
        run_from_disk: the torch device of a dense model whose blocks are read from disk when they run, where its files allow
            that; None reads the model into memory.

    Raises:
        InputError: there is no such model, it is no causal decoder, or its files are damaged or missing.
    """
    _refuse_gguf(name)
    need_transformers()
    if name == NAME:
        return _from_folder(name, smollm2_folder(), WEIGHTS, seq_len, run_from_disk)
    if name.startswith(HUB):
        folder, weights = fetch_transformers_folder(name), f"{name.removeprefix(HUB)}{ON_HUB}"
        return _from_folder(name, folder, weights, seq_len, run_from_disk)
    return _from_folder(name, Path(name.removeprefix(LOCAL)), name, seq_len, run_from_disk)


def need_transformers() -> None:
    """Raises InputError if transformers is not installed."""
    try:
        import transformers
    except ImportError:
        raise InputError("language models need transformers: pip install 'vitoats[lm]'") from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def language_model_in_memory(
    model: Any, tokenizer: Any, name: str | None = None, seq_len: int | None = None
) -> LoadedLanguageModel:
    """Wraps a copy of a transformers model that is already in memory; the caller's model stays unchanged.

    Raises:
        InputError: it is no causal decoder, or has NaN or infinite weights.
    """
    need_transformers()
    check_config(model.config, type(model).__name__)
    named = name or model.config.name_or_path or type(model).__name__
    return _loaded(named, copy.deepcopy(model).float(), tokenizer, IN_MEMORY, seq_len)


def _from_folder(name: str, folder: Path, weights: str, seq_len: int | None, run_from_disk: str | None) -> LoadedLanguageModel:
    _check_files(folder)
    config = read_transformers_config(folder)
    tokenizer = read_tokenizer(folder)
    if (folder / ABOUT).is_file() and not name.startswith(LOCAL):
        model, about = load_compressed(folder, config)
        loaded = _loaded(name, model, tokenizer, about.get("weights", weights), seq_len or about["preprocessing"]["seq_len"])
        loaded.about = about
        return loaded
    if (folder / ABOUT).is_file() and read_json(folder / ABOUT).get("format") == "factored":
        raise InputError(
            f"{folder} holds a compressed model, which transformers cannot open: use `model` {folder}, without local-dir:"
        )
    _check_headers(folder)
    disk = None if run_from_disk is None else open_on_disk(folder, config, run_from_disk)
    return _loaded(name, disk or _stock_model(folder), tokenizer, weights, seq_len)


def _loaded(name: str, found: Any, tokenizer: Any, weights: str, seq_len: int | None) -> LoadedLanguageModel:
    """Wraps a transformers model, or one on disk."""
    disk = found if isinstance(found, ModelOnDisk) else None
    model, types = (disk.model, disk.types()) if disk else (found, {})
    packing = Packing(window_length(model.config, seq_len))
    loaded = LoadedLanguageModel(name, model.eval().requires_grad_(False), tokenizer, packing, weights, types=types, disk=disk)
    check_weights(name, loaded.dense_tensors())
    return loaded


def window_length(config: Any, seq_len: int | None) -> int:
    """The tokens of a window of a transformers model; see ``window_of``."""
    return window_of(getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None), seq_len)


def window_of(positions: int | None, seq_len: int | None) -> int:
    """The tokens of a window: as many as asked for, cut to the model's positions, of which None is any number.

    Raises:
        InputError: fewer than 2 tokens are asked for.
    """
    if positions is not None and not (type(positions) is int and positions >= 2):
        raise InputError(f"the model says that it has {positions!r:.50} positions: correct its config.json")
    if seq_len is not None and seq_len < 2:
        raise InputError(f"a window of {seq_len} tokens predicts nothing: give `seq_len` 2 or more")
    if positions and seq_len and seq_len > positions:
        log.warning("windows are cut to the model's %d positions, from %d tokens", positions, seq_len)
    return min(seq_len or SEQ_LEN, positions or seq_len or SEQ_LEN)


def read_transformers_config(folder: Path) -> Any:
    """Reads a folder's config.json as untrusted data.

    Raises:
        InputError: it is damaged, or describes no causal decoder that the installed transformers has.
    """
    from transformers import AutoConfig

    path = folder / CONFIG
    said = read_json(path)
    if any("/" in str(said.get(key, "")) for key in ("attn_implementation", "_attn_implementation")):
        raise InputError(f"{path} names attention code to fetch, which is never run: remove it there")
    try:
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises various errors on what it does not know
        if "auto_map" in said:
            raise InputError(f"{folder} needs code of its own, which is never run: {REMEDY}") from None
        raise InputError(f"{path} describes no model that this transformers has ({one_line(error, 150)}): update it") from None
    check_config(config, str(folder))
    return config


def check_config(config: Any, name: str) -> None:
    """Refuses what is no causal decoder in floating point.

    Raises:
        InputError: such a model.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if getattr(config, "is_encoder_decoder", False):
        raise InputError(f"{name} has an encoder and a decoder, of which only decoders alone can be compressed: {REMEDY}")
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise InputError(f"{name} is a {config.model_type}, which is no causal language model: {REMEDY}")
    for key in COUNTS:
        if (value := getattr(config, key, None)) is not None and not (type(value) is int and value > 0):
            raise InputError(f"{name} says that its {key} is {value!r:.50}: correct its config.json")
    if getattr(config, "quantization_config", None):
        raise InputError(f"{name} is quantized already: use the model from which it was made")


def _check_files(folder: Path) -> None:
    """Raises InputError if something that transformers may read from a folder is no file, or too large."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        try:
            if path.suffix in READ:
                check_regular(path, LARGEST_TEXT)
        except (OSError, ValueError) as error:
            raise InputError(f"{path} is damaged ({one_line(error, 100)}): copy the folder again") from None


def _check_headers(folder: Path) -> None:
    """Raises InputError if a safetensors file of a folder is missing, or cannot be one."""
    for file in tensor_files(folder):
        try:
            check_header(file)
        except (OSError, ValueError) as error:
            raise InputError(f"{file} is damaged ({one_line(error, 100)}): copy the folder again") from None


def _stock_model(folder: Path) -> nn.Module:
    """Loads a folder of transformers' own, from safetensors files only.

    Raises:
        InputError: files are missing, damaged, or do not fit the configuration.
    """
    from transformers import AutoModelForCausalLM

    try:
        with no_more_than(_held(folder), folder / CONFIG):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                str(folder), dtype=torch.float32, local_files_only=True, use_safetensors=True, output_loading_info=True
            )
    except InputError:
        raise
    except Exception as error:  # transformers, torch and safetensors raise various errors on files that do not fit
        raise InputError(f"{folder} cannot be loaded ({one_line(error, 200)}): copy the folder again") from None
    model, found = loaded
    lacking = sorted(found["missing_keys"])
    if lacking:
        raise InputError(f"{folder} lacks the weight {lacking[0]}" + f" and {len(lacking) - 1} more" * (len(lacking) > 1))
    return model


def _held(folder: Path) -> Held:
    """The size of a folder's weight files, as the construction of its model counts it."""
    files, tensors = tensor_files(folder), 0
    for path in files:
        with open_tensors(path) as file:
            tensors += len(list(file.keys()))
    return Held(REGISTERED * tensors, REGISTERED * sum(path.stat().st_size for path in files))


def read_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer; None if it has none."""
    from transformers import AutoTokenizer

    if not any(
        (folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
    ):
        return None
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # any tokenizer class may fail in its own way
        log.warning("the tokenizer of %s cannot be read: %s", folder, one_line(error, 150))
        return None
