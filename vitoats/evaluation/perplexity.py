"""The perplexity of a causal language model on text, with a sliding window.

A window of ``context`` tokens moves by ``stride``; only the last ``stride`` tokens of each are scored (all of the first). So
each token but the first is predicted once, from at least context - stride tokens before it where there are that many. Windows
that do not overlap (stride = context) leave out the first token of each. With S the sum of the scored tokens' negative
log-likelihoods, in nats:

    per token   exp(S / tokens)
    per word    exp(S / words), where words are what is between white space: comparable between tokenizers

The standard error comes from the windows' mean negative log-likelihoods, taken as independent; it is that of the logarithm
times the perplexity. Two models on the same windows are compared by the difference of these means, window by window.
"""

import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitoats.common.errors import InputError, RunError
from vitoats.common.fingerprint import json_sha256
from vitoats.common.json_files import REMEDY
from vitoats.common.noted import note
from vitoats.common.unfinished import Unfinished
from vitoats.data.text import documents, token_stream
from vitoats.evaluation.paired import paired_difference
from vitoats.models.text_inputs import LOGITS_AT_A_TIME


@dataclass(frozen=True)
class TestText:
    """Text to measure on.

    Attributes:
        tokens: int64 [n].
        words: number of words that the tokens stand for.
    """

    __test__ = False  # no test case

    tokens: Tensor
    words: int


@dataclass(frozen=True)
class Perplexity:
    """A model's perplexity.

    Attributes:
        nll: float64 [n], each window's mean negative log-likelihood of its scored tokens, in nats.
        scored: int64 [n], each window's number of scored tokens.
        words: number of words of the text.
        seconds: time of the forward passes.
    """

    nll: Tensor
    scored: Tensor
    words: int
    seconds: float

    @property
    def tokens(self) -> int:
        """Number of scored tokens."""
        return int(self.scored.sum())

    @property
    def total(self) -> float:
        """S, the sum over all scored tokens, in nats."""
        return float((self.nll * self.scored).sum())

    @property
    def per_token(self) -> float:
        return math.exp(self.total / self.tokens)

    @property
    def per_word(self) -> float:
        """Infinite where a word is too improbable for a float."""
        return math.exp(min(self.total / self.words, 700.0))

    @property
    def standard_error(self) -> float | None:
        """Of the perplexity per token; None for a single window."""
        n = len(self.nll)
        return None if n < 2 else self.per_token * float(self.nll.std()) / n**0.5

    def against(self, dense: "Perplexity") -> tuple[float, float | None]:
        """The mean difference of the windows' ``nll`` from the dense model's, and its standard error; None for one window."""
        difference, error = paired_difference(self.nll.numpy(), dense.nll.numpy())
        return difference, error if len(self.nll) > 1 else None

    def to_dict(self) -> dict[str, Any]:
        """Figures, for JSON."""
        return {
            "perplexity": round(self.per_token, 4),
            "perplexity_se": rounded_error(self.standard_error, 4),
            "word_perplexity": round(self.per_word, 4),
            "n_windows": len(self.nll),
            "n_tokens": self.tokens,
            "n_words": self.words,
            "tokens_per_second": round(self.tokens / self.seconds, 1),
        }


def rounded_error(error: float | None, digits: int) -> float | None:
    """A standard error for JSON, which is None for a single window."""
    return None if error is None else round(error, digits)


def read_test_text(source: Any, tokenizer: Any, vocab_size: int, max_tokens: int | None = None) -> TestText:
    """Reads and tokenizes text.

    Args:
        source: as for ``data.text.open_text``.
        tokenizer: a transformers tokenizer.
        vocab_size: number of tokens that the model knows.
        max_tokens: the text ends with the document in which this number is reached; None takes all.

    Raises:
        InputError: the text cannot be read, has fewer than two tokens, or the tokenizer does not belong to the model.
    """
    found, words, n = [], 0, 0
    for text in documents(source):
        found.append(token_stream([text], tokenizer))
        words, n = words + len(text.split()), n + len(found[-1])
        if max_tokens is not None and n >= max_tokens:
            break
    if n < 2:
        raise InputError("the text has fewer than 2 tokens: give `images` more text")
    tokens = torch.cat(found)
    if int(tokens.max()) >= vocab_size:
        raise InputError(
            f"the tokenizer gives token {int(tokens.max())}, but the model knows {vocab_size}: "
            "put the tokenizer that belongs to the model in its folder"
        )
    note(lambda: {f"tokens of {source}": hashlib.sha256(tokens.numpy().tobytes()).hexdigest()})
    kept = len(tokens) if max_tokens is None else min(max_tokens, len(tokens))
    return TestText(tokens[:kept], max(1, round(words * kept / len(tokens))))


LogitsOf = Callable[[Tensor], Tensor]  # from windows of tokens, int64 [b, t] on the CPU, to their logits [b, t, vocab_size]


def torch_logits(model: Any) -> LogitsOf:
    """The logits of a transformers model, on its device."""
    device = next(model.parameters()).device
    return lambda windows: model(input_ids=windows.to(device), use_cache=False).logits


def perplexity(
    model: Any,
    text: TestText,
    context: int,
    stride: int,
    batch_size: int = 4,
    progress: Callable[[int, int], None] = lambda *_: None,
    unfinished: Unfinished | None = None,
) -> Perplexity:
    """Measures the perplexity of a transformers model, on its device; see ``measure_perplexity``."""
    vocab_size = model.config.get_text_config().vocab_size
    return measure_perplexity(torch_logits(model), vocab_size, text, context, stride, batch_size, progress, unfinished)


def unfinished_perplexity(
    digest: str, text: TestText, context: int, stride: int, batch_size: int, folder: Path | None = None
) -> Unfinished:
    """The windows that an interrupted measurement has finished, in a folder or the user's cache; ``digest`` is the model's."""
    measured = [digest, json_sha256(text.tokens.tolist()), context, stride, batch_size]
    return Unfinished(f"perplexity_{json_sha256(measured)[:32]}", folder)


@torch.inference_mode()
def measure_perplexity(
    logits_of: LogitsOf,
    vocab_size: int,
    text: TestText,
    context: int,
    stride: int,
    batch_size: int = 4,
    progress: Callable[[int, int], None] = lambda *_: None,
    unfinished: Unfinished | None = None,
) -> Perplexity:
    """Measures a model's perplexity.

    Args:
        logits_of: the model.
        vocab_size: number of tokens that it knows.
        text: the text.
        context: tokens of a window.
        stride: tokens by which the window moves, at most ``context``.
        batch_size: windows at a time.
        progress: called with windows done and their number.
        unfinished: the windows that an interrupted measurement has finished; further ones are added.

    Raises:
        InputError: context or stride is out of range.
        RunError: an output is not finite.
    """
    if context < 2 or not 1 <= stride <= context:
        raise InputError(f"a window of {context} tokens cannot move by {stride}: give `stride` a number from 1 to `context`")
    n = len(text.tokens)
    known = max(1, context - stride)  # tokens of a window that are not scored
    starts = [0, *(start for start in range(stride, n, stride) if start + known < n)]
    done: list[tuple[float, int, float]] = [tuple(part) for part in unfinished.parts] if unfinished else []
    while (i := len(done)) < len(starts):
        start_time = time.perf_counter()
        whole = [s for s in starts[i : i + batch_size] if s + context <= n] or starts[i : i + 1]
        windows = torch.stack([text.tokens[s : s + context] for s in whole])
        losses = _losses(logits_of, vocab_size, windows)
        new = [loss if s == 0 else loss[known - 1 :] for s, loss in zip(whole, losses, strict=True)]
        nll = [loss.double().mean().item() for loss in new]
        if not all(map(math.isfinite, nll)):
            raise RunError(f"the model's outputs are not finite (NaN or Inf): {REMEDY}")
        seconds = (time.perf_counter() - start_time) / len(new)
        parts = [(mean, len(loss), seconds) for mean, loss in zip(nll, new, strict=True)]
        done += parts
        if unfinished:
            unfinished.add(parts)
        progress(len(done), len(starts))
    means, scored, times = zip(*done, strict=True)
    return Perplexity(torch.tensor(means, dtype=torch.float64), torch.tensor(scored), text.words, sum(times))


def _losses(logits_of: LogitsOf, vocab_size: int, windows: Tensor) -> Tensor:
    """The negative log-likelihood of each token but the first, [b, t - 1], in float32.

    The logits of all tokens of a window are one tensor; large batches run window by window.
    """
    losses = []
    at_a_time = max(1, LOGITS_AT_A_TIME * 4 // (windows.shape[1] * vocab_size))
    for some in windows.split(at_a_time):
        logits = logits_of(some)[:, :-1].flatten(0, 1).float()
        targets = some[:, 1:].flatten().to(logits.device)
        losses.append(F.cross_entropy(logits, targets, reduction="none").view(len(some), -1))
    return torch.cat(losses).cpu()
