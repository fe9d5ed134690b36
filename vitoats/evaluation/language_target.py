"""A language model whose perplexity is measured: in torch, or in ONNX."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vitoats.common.errors import InputError, one_line
from vitoats.common.file_digests import files_sha256
from vitoats.common.fingerprint import tensors_sha256
from vitoats.evaluation.perplexity import LogitsOf, torch_logits
from vitoats.loading.language_models import load_language_model, read_tokenizer, window_of
from vitoats.loading.loaded_text import untied_state
from vitoats.runtime.decoder import MODEL, Decoder, is_decoder
from vitoats.runtime.inference import data_file, metadata


@dataclass(frozen=True)
class LanguageTarget:
    """A model to measure.

    Attributes:
        name: the name that it was requested by.
        logits_of: the model.
        vocab_size: number of tokens that it knows.
        seq_len: tokens of a window.
        tokenizer: its transformers tokenizer; None if there is none.
        digest: computes a SHA-256 of its weights.
    """

    name: str
    logits_of: LogitsOf
    vocab_size: int
    seq_len: int
    tokenizer: Any
    digest: Callable[[], str]

    def need_tokenizer(self) -> Any:
        """The tokenizer.

        Raises:
            InputError: the model has none.
        """
        if self.tokenizer is None:
            raise InputError(f"{self.name} has no tokenizer: put its tokenizer.json there")
        return self.tokenizer


def language_target(name: str, context: int | None, device: str, threads: int) -> LanguageTarget:
    """Opens a model.

    Args:
        name: an ONNX folder or the .onnx file in it, or a model as ``load_language_model`` takes it.
        context: tokens of a window; None for the model's usual ones.
        device: of a model in torch.
        threads: of ONNX Runtime; 0 for all cores.

    Raises:
        InputError: there is no such model, or it cannot be run.
    """
    if is_decoder(name) or name.endswith(".onnx"):
        decoder = Decoder(Path(name), threads)
        file = decoder.folder / MODEL
        try:
            usual = metadata(decoder.session).get("seq_len")
        except ValueError as error:
            raise InputError(f"the metadata of {file} is damaged ({one_line(error, 100)}): export it again") from None
        length = window_of(decoder.context_length, context or (usual if isinstance(usual, int) else None))
        return LanguageTarget(
            name,
            lambda windows: torch.from_numpy(decoder.logits(windows.numpy())),
            decoder.vocab_size,
            length,
            read_tokenizer(decoder.folder),
            lambda: files_sha256((file, data_file(file))),
        )
    loaded = load_language_model(name, context)
    model = loaded.model.to(device)
    return LanguageTarget(
        name,
        torch_logits(model),
        loaded.inputs.vocab_size,
        loaded.preprocessing.seq_len,
        loaded.tokenizer,
        lambda: tensors_sha256(untied_state(model)),
    )
