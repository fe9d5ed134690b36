"""Compares an exported language model with the torch model that it came from: logits with and without a cache, and its text."""

import copy
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from vitoats.common.errors import RunError
from vitoats.common.json_files import REMEDY
from vitoats.format.int8_layers import to_int8
from vitoats.format.layers import SparseLowRankLinear, replace_module
from vitoats.loading.loaded_text import LoadedLanguageModel
from vitoats.runtime.decoder import Decoder

PROMPT, ANSWER = 16, 64  # tokens


@dataclass(frozen=True)
class DecoderAgreement:
    """How closely an exported language model agrees with torch.

    Attributes:
        relative_error: largest difference of a logit over the largest logit, for a window of random tokens.
        step_error: the same for the tokens of the answer, one after the other, with a cache.
        n_tokens: number of tokens of a greedy answer.
        same_tokens: how many of them are the same in both, before the first that differs.
        gap: in torch, the largest logit minus that of the token that the file chose, where they first differ; 0 if nowhere.
    """

    relative_error: float
    step_error: float
    n_tokens: int
    same_tokens: int
    gap: float


@torch.inference_mode()
def verify_decoder(loaded: LoadedLanguageModel, decoder: Decoder, seed: int = 0) -> DecoderAgreement:
    """Compares logits and greedy answers. The cache is given torch's answer.

    Args:
        loaded: the torch model.
        decoder: the exported one.
        seed: of the random tokens.

    Raises:
        RunError: a logit of the model or of the file is not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    window = torch.randint(loaded.inputs.vocab_size, (1, PROMPT), generator=generator)
    n = min(ANSWER, decoder.context_length - PROMPT)
    expected = loaded.model(input_ids=window, use_cache=True)
    relative_error = _error(decoder.logits(window.numpy())[0], expected.logits[0].numpy())
    cache, found = decoder.start(PROMPT + n), window[0].numpy()
    step_error, same, gap = 0.0, 0, 0.0
    for _ in range(n):
        of_torch, of_file = expected.logits[0, -1].numpy(), cache.extend(found)
        step_error = max(step_error, _error(of_file, of_torch))
        token = int(of_torch.argmax())
        if gap == 0.0:
            gap = float(of_torch[token] - of_torch[of_file.argmax()])
            same += gap == 0.0
        found = np.array([token])
        expected = loaded.model(input_ids=torch.tensor([[token]]), past_key_values=expected.past_key_values, use_cache=True)
    return DecoderAgreement(relative_error, step_error, n, same, gap)


def _error(found: np.ndarray, expected: np.ndarray) -> float:
    for logits, whose in ((expected, "the torch model"), (found, "the exported file")):
        if not np.isfinite(logits).all():
            raise RunError(f"logits of {whose} are not finite (NaN or Inf): {REMEDY}")
    return float(np.abs(found - expected).max() / np.maximum(np.abs(expected).max(), np.finfo(np.float32).tiny))


def rounded_language_model(loaded: LoadedLanguageModel) -> LoadedLanguageModel:
    """A copy of a model with the weights of all linear layers rounded to int8, those of the head, too, as export does it.

    Raises:
        InputError: a weight is not finite.
    """
    copied = copy.deepcopy(loaded)
    for name, module in list(copied.model.named_modules()):
        if isinstance(module, (SparseLowRankLinear, nn.Linear)):
            replace_module(copied.model, name, to_int8(module))
    return copied
