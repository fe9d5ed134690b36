"""What runs a language model in a benchmark: ONNX Runtime, or llama.cpp. An engine takes tokens and keeps a cache."""

import ctypes
import importlib.util
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from vitoats.common.errors import RunError
from vitoats.runtime.decoder import Decoder


class Engine(Protocol):
    """A model with a cache."""

    def start(self) -> None:
        """Empties the cache."""

    def extend(self, tokens: np.ndarray) -> np.ndarray:
        """Appends tokens [t]; returns the logits [vocab_size] of what follows them."""

    def close(self) -> None:
        """Frees its memory."""


class OnnxEngine:
    """An exported folder in ONNX Runtime."""

    def __init__(self, folder: Path, length: int, threads: int):
        self.decoder, self.length = Decoder(folder, threads), length
        self.start()

    def start(self) -> None:
        self._cache = self.decoder.start(self.length)

    def extend(self, tokens: np.ndarray) -> np.ndarray:
        return self._cache.extend(tokens)

    def close(self) -> None:
        del self._cache, self.decoder


class LlamaCppEngine:
    """A GGUF file in llama.cpp, by the functions of the package llama-cpp-python.

    Its own arrangements of weights in memory are off: with AMX, version 0.3.36 crashes.
    """

    def __init__(self, file: Path, length: int, threads: int, vocab_size: int):
        import llama_cpp

        self._library: Any = llama_cpp
        self._silent = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._silent, ctypes.c_void_p())
        llama_cpp.llama_backend_init()
        parameters: Any = llama_cpp.llama_model_default_params()
        parameters.use_extra_bufts = False
        self._model = llama_cpp.llama_model_load_from_file(str(file).encode(), parameters)
        settings: Any = llama_cpp.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = length
        settings.n_threads = settings.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, settings) if self._model else None
        if not self._context:
            raise RunError(f"llama.cpp cannot open {file}: use another version of llama-cpp-python")
        self._vocab_size = vocab_size

    def start(self) -> None:
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)

    def extend(self, tokens: np.ndarray) -> np.ndarray:
        array = (self._library.llama_token * len(tokens))(*tokens.tolist())
        status = self._library.llama_decode(self._context, self._library.llama_batch_get_one(array, len(tokens)))
        if status != 0:
            raise RunError(f"llama.cpp failed with status {status}: use another version of llama-cpp-python")
        logits = self._library.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(logits, shape=(self._vocab_size,))

    def close(self) -> None:
        self._library.llama_free(self._context)
        self._library.llama_model_free(self._model)


def has_llama_cpp() -> bool:
    """Whether llama-cpp-python and gguf are installed."""
    return all(importlib.util.find_spec(name) is not None for name in ("llama_cpp", "gguf"))
