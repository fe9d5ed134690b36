"""Compares an exported language model with the torch model that it came from: logits with and without a cache, and its text.

int8 layers round each token on the way. Where a number lies between two levels, round-off decides, and the next layers round
again: logits of one int8 model differ by far more than round-off if sums are in another order. So torch is also compared with
itself, which says how wide a gap between two tokens can be and still be a tie.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vitoats.common.errors import RunError
from vitoats.common.json_files import REMEDY
from vitoats.format.int8_layers import to_int8
from vitoats.format.layers import SparseLowRankLinear, replace_module
from vitoats.loading.loaded_text import LoadedLanguageModel
from vitoats.runtime.decoder import Decoder

WINDOW, ANSWER = 16, 64  # tokens
PROMPT = "The sea is deep, and"
ROUND_OFF = 1e-6  # relative; about that of a sum in float32


@dataclass(frozen=True)
class DecoderAgreement:
    """How closely an exported language model agrees with torch.

    Attributes:
        relative_error: largest difference of a logit over the largest logit, for a window of random tokens.
        step_error: the same for the tokens of the answer, one after the other, with a cache.
        n_tokens: number of tokens of a greedy answer.
        same_tokens: how many of them are the same in both, before the first that differs.
        gap: in torch, the largest logit minus that of the token that the file chose, where they first differ; 0 if nowhere.
        rounding: the most by which the gap between torch's two best tokens changes, anywhere in its answer, if torch reads the
            answer at once, with embeddings that differ by round-off.
        near_tie: whether the gap is at most twice that; True if no token differs.
    """

    relative_error: float
    step_error: float
    n_tokens: int
    same_tokens: int
    gap: float
    rounding: float
    near_tie: bool

    def __str__(self) -> str:
        if self.same_tokens == self.n_tokens:
            return f"all {self.n_tokens} tokens of a greedy answer are torch's"
        judged = "a near tie" if self.near_tie else "no near tie"
        return (
            f"{self.same_tokens} of {self.n_tokens} tokens of a greedy answer are torch's; its next is {self.gap:.2g} above "
            f"the file's, and round-off alone changes such gaps in torch by up to {self.rounding:.2g}: {judged}"
        )


@torch.inference_mode()
def verify_decoder(loaded: LoadedLanguageModel, decoder: Decoder, seed: int = 0) -> DecoderAgreement:
    """Compares logits and greedy answers. The cache is given torch's answer.

    Args:
        loaded: the torch model, with the weights that the file has (``as_stored``).
        decoder: the exported one.
        seed: of random tokens.

    Raises:
        InputError: the torch model has no tokenizer.
        RunError: a logit of the model or of the file is not finite.
    """
    model, generator = loaded.model, torch.Generator().manual_seed(seed)
    window = torch.randint(loaded.inputs.vocab_size, (1, WINDOW), generator=generator)
    relative_error = _error(decoder.logits(window.numpy())[0], model(input_ids=window).logits[0].numpy())

    prompt = torch.tensor([loaded.need_tokenizer()(PROMPT).input_ids])
    tokens, expected = _greedy_answer(model, prompt, min(ANSWER, decoder.context_length - prompt.shape[1]))
    found = _logits_of_file(decoder, prompt, tokens)
    with _round_off(model.get_input_embeddings(), generator):
        moved = model(input_ids=torch.cat([prompt, tokens], dim=1)).logits[0, prompt.shape[1] - 1 : -1]
    best = expected.topk(2).indices
    rounding = float((moved - expected).gather(1, best).diff(dim=1).abs().max())

    of_file = torch.tensor(found.argmax(axis=-1))
    differing = (of_file != tokens[0]).nonzero()[:, 0].tolist()
    same = differing[0] if differing else tokens.shape[1]
    gap = float(expected[same].max() - expected[same, of_file[same]]) if differing else 0.0
    step_error = max(_error(*both) for both in zip(found, expected.numpy(), strict=True))
    return DecoderAgreement(relative_error, step_error, tokens.shape[1], same, gap, rounding, gap <= 2 * rounding)


def _greedy_answer(model: Any, prompt: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The n tokens [1, n] that torch adds to a prompt [1, t], and the logits [n, vocab_size] that they were chosen by."""
    output, tokens, logits = model(input_ids=prompt, use_cache=True), [], []
    for _ in range(n):
        logits.append(output.logits[0, -1])
        tokens.append(logits[-1].argmax())
        output = model(input_ids=tokens[-1][None, None], past_key_values=output.past_key_values, use_cache=True)
    return torch.stack(tokens)[None], torch.stack(logits)


def _logits_of_file(decoder: Decoder, prompt: Tensor, tokens: Tensor) -> np.ndarray:
    """The file's logits [n, vocab_size] before each of n tokens [1, n], which follow a prompt [1, t]."""
    cache = decoder.start(prompt.shape[1] + tokens.shape[1])
    return np.stack([cache.extend(given) for given in (prompt[0].numpy(), *tokens[0, :-1, None].numpy())])


@contextmanager
def _round_off(embedding: nn.Module, generator: torch.Generator) -> Iterator[None]:
    """In this context, an embedding's outputs differ by round-off."""

    def change(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        return output * (1 + ROUND_OFF * (2 * torch.rand(output.shape, generator=generator) - 1))

    handle = embedding.register_forward_hook(change)
    try:
        yield
    finally:
        handle.remove()


def _error(found: np.ndarray, expected: np.ndarray) -> float:
    for logits, whose in ((expected, "the torch model"), (found, "the exported file")):
        if not np.isfinite(logits).all():
            raise RunError(f"logits of {whose} are not finite (NaN or Inf): {REMEDY}")
    return float(np.abs(found - expected).max() / np.maximum(np.abs(expected).max(), np.finfo(np.float32).tiny))


def as_stored(loaded: LoadedLanguageModel, float16: bool = False, int8: bool = False) -> LoadedLanguageModel:
    """A copy of a model with weights rounded as export rounds them; int8 layers then round tokens, too.

    Args:
        loaded: the model.
        float16: round S, U and V of compressed layers to float16.
        int8: round all linear layers to int8, the head, too.

    Raises:
        InputError: a weight is not finite.
    """
    copied = copy.deepcopy(loaded)
    for name, module in list(copied.model.named_modules()):
        if int8 and isinstance(module, (SparseLowRankLinear, nn.Linear)):
            replace_module(copied.model, name, to_int8(module))
        elif float16 and isinstance(module, SparseLowRankLinear):
            replace_module(copied.model, name, _in_float16(module))
    return copied


def _in_float16(layer: SparseLowRankLinear) -> SparseLowRankLinear:
    S, U, V = ([tensor.half().float() for tensor in tensors] for tensors in ([layer.S], layer.U, layer.V))
    return SparseLowRankLinear(S[0], U, V, layer.bias)
