"""Runs a language model in ONNX with a key-value cache: logits, and text token by token. numpy and onnxruntime only.

A folder has model.onnx, genai_config.json and tokenizer files, as ONNX Runtime GenAI has it. Keys and values of earlier tokens
are in one buffer for each layer, which the model reads and writes, so that nothing is copied from step to step.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from vitoats.common.errors import InputError, one_line
from vitoats.common.json_files import read_json
from vitoats.common.plain_values import item, whole
from vitoats.runtime.inference import Session, session
from vitoats.runtime.sampling import Sampler, greedy

MODEL, CONFIG = "model.onnx", "genai_config.json"
PAST, PRESENT = "past_key_values.", "present."
TOKENS, MASK, POSITIONS, LOGITS = "input_ids", "attention_mask", "position_ids", "logits"


def is_decoder(path: str | Path) -> bool:
    """Whether a path is a folder with a language model in ONNX, or the .onnx file in it."""
    folder = _folder(path)
    return (folder / CONFIG).is_file() and (folder / MODEL).is_file()


class Decoder:
    """A language model in ONNX Runtime.

    Attributes:
        folder: where it is.
        session: the session.
        context_length: the most tokens that the model takes, of prompt and answer together.
        vocab_size: number of tokens that it knows.
        end_tokens: tokens that end a text.
    """

    def __init__(self, path: str | Path, threads: int = 0, native: bool = True):
        """Opens a model.

        Args:
            path: the folder, or the .onnx file in it.
            threads: threads of one step; 0 for all cores.
            native: whether to use the native library.

        Raises:
            InputError: there is no such model, or ONNX Runtime cannot run it.
        """
        self.folder = _folder(path)
        if not is_decoder(self.folder):
            raise InputError(f"{path} is no language model in ONNX: write one with tools/export_onnx.py")
        try:
            config = read_json(self.folder / CONFIG)["model"]
            decoder = config["decoder"]
            self._heads, self._width = (whole(item(decoder, x), x, 1) for x in ("num_key_value_heads", "head_size"))
            self.context_length, self.vocab_size = (whole(item(config, x), x, 1) for x in ("context_length", "vocab_size"))
            end = config.get("eos_token_id")
            ends = end if isinstance(end, list) else [] if end is None else [end]
            self.end_tokens = tuple(whole(token, "eos_token_id") for token in ends)
        except (KeyError, TypeError, ValueError) as error:
            reason = one_line(error, 100)
            raise InputError(f"{self.folder / CONFIG} does not describe a model ({reason}): export it again") from None
        self.session: Session = session(self.folder / MODEL, threads, native)
        self._inputs = {each.name for each in self.session.get_inputs()}
        self._cached = sorted(name.removeprefix(PAST) for name in self._inputs if name.startswith(PAST))
        if not self._cached or not {TOKENS, MASK} <= self._inputs:
            raise InputError(f"{self.folder / MODEL} has no key-value cache: export it again")
        shapes = [each.shape for each in self.session.get_inputs() if each.name.startswith(PAST)]
        sizes = {
            (size, stated) for shape in shapes for size, stated in zip(shape[1::2], (self._heads, self._width), strict=False)
        }
        if any(len(shape) != 4 for shape in shapes) or any(isinstance(size, int) and size != stated for size, stated in sizes):
            raise InputError(f"{self.folder / CONFIG} has other heads than {MODEL}: export it again")

    def logits(self, windows: np.ndarray) -> np.ndarray:
        """The logits [b, t, vocab_size] of windows of tokens [b, t], without a cache."""
        empty = np.zeros((len(windows), self._heads, 0, self._width), np.float32)
        feed: dict[str, Any] = {f"{PAST}{name}": empty for name in self._cached}
        feed |= self._step(windows, 0)
        return self.session.run([LOGITS], feed)[0]

    def start(self, length: int) -> "Cache":
        """An empty cache for up to ``length`` tokens.

        Raises:
            InputError: the model takes fewer tokens.
        """
        if not 1 <= length <= self.context_length:
            raise InputError(
                f"the model takes {self.context_length} tokens, not {length}: give a shorter prompt or fewer `max_new_tokens`"
            )
        return Cache(self, length)

    def generate(self, prompt: Sequence[int], max_new_tokens: int, sampler: Sampler = greedy) -> Iterator[int]:
        """Continues a text, token by token, up to a token that ends it, which is given, too.

        Args:
            prompt: its tokens, at least one.
            max_new_tokens: the most tokens to add.
            sampler: chooses a token from the logits [vocab_size].

        Raises:
            InputError: the prompt is empty, has a token that the model does not know, or is too long.
        """
        tokens = np.asarray(prompt, np.int64)
        if tokens.size == 0:
            raise InputError("the prompt has no tokens: give `prompt` some text")
        if tokens.min() < 0 or tokens.max() >= self.vocab_size:
            raise InputError(f"the prompt has the token {tokens.max()}, but the model knows {self.vocab_size}: check `model`")
        cache = self.start(len(tokens) + max_new_tokens)
        for _ in range(max_new_tokens):
            token = sampler(cache.extend(tokens))
            yield token
            if token in self.end_tokens:
                return
            tokens = np.array([token])

    def _step(self, tokens: np.ndarray, before: int) -> dict[str, np.ndarray]:
        """The inputs, the cache apart, for tokens [b, t] that follow others."""
        b, t = tokens.shape
        feed = {TOKENS: np.ascontiguousarray(tokens, np.int64), MASK: np.ones((b, before + t), np.int64)}
        if POSITIONS in self._inputs:
            feed[POSITIONS] = np.tile(np.arange(before, before + t), (b, 1))
        return feed


class Cache:
    """The keys and values of the tokens of a text so far.

    Attributes:
        n: number of these tokens.
        length: the most of them.
    """

    def __init__(self, decoder: Decoder, length: int):
        self.n, self.length = 0, length
        self._decoder = decoder
        shape = (1, decoder._heads, length, decoder._width)
        self._buffers = {name: ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32)) for name in decoder._cached}
        self._run_options = ort.RunOptions()
        self._run_options.only_execute_path_to_fetches = True  # without the logits, the head is not computed
        self._without_logits, self._with_logits = self._binding(), self._binding()

    def extend(self, tokens: np.ndarray) -> np.ndarray:
        """Appends tokens [t]; returns the logits [vocab_size] of what follows them.

        Raises:
            InputError: there is no room for them.
        """
        if len(tokens) > 1:
            self._run(self._without_logits, tokens[:-1])
        return self.logits(tokens[-1:])[0]

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """Appends tokens [t]; returns the logits [t, vocab_size] of what follows each of them.

        Raises:
            InputError: there is no room for them.
        """
        self._with_logits.bind_output(LOGITS, "cpu")  # anew, as its shape is another one
        self._run(self._with_logits, tokens)
        return self._with_logits.get_outputs()[-1].numpy()[0]

    def _binding(self) -> ort.IOBinding:
        binding = self._decoder.session.io_binding()
        for name, buffer in self._buffers.items():
            binding.bind_ortvalue_input(f"{PAST}{name}", buffer)
            binding.bind_ortvalue_output(f"{PRESENT}{name}", buffer)
        return binding

    def _run(self, binding: ort.IOBinding, tokens: np.ndarray) -> None:
        if self.n + len(tokens) > self.length:
            raise InputError(f"the cache has room for {self.length} tokens: start a longer one")
        for name, array in self._decoder._step(tokens[None], self.n).items():
            binding.bind_cpu_input(name, array)
        self._decoder.session.run_with_iobinding(binding, self._run_options)
        self.n += len(tokens)


def _folder(path: str | Path) -> Path:
    path = Path(path)
    return path.parent if path.suffix == ".onnx" else path
