"""The choice of a token from its logits."""

from collections.abc import Callable

import numpy as np

from vitoats.common.errors import InputError

Sampler = Callable[[np.ndarray], int]  # takes logits [vocab_size]


def greedy(logits: np.ndarray) -> int:
    """The most probable token."""
    return int(logits.argmax())


def top_p_sampler(temperature: float, top_p: float = 1.0, seed: int = 0) -> Sampler:
    """A sampler that draws from the most probable tokens that together have probability ``top_p``.

    Args:
        temperature: the logits are divided by it; 0 for the most probable token.
        top_p: from above 0 to 1; 1 takes all tokens.
        seed: of the draws.

    Raises:
        InputError: a number is out of range.
    """
    if not 0 <= temperature < float("inf"):
        raise InputError(f"{temperature} is no temperature: give `temperature` 0 or more")
    if not 0 < top_p <= 1:
        raise InputError(f"{top_p} is no probability: give `top_p` a number above 0, at most 1")
    if temperature == 0:
        return greedy
    random = np.random.default_rng(seed)

    def sample(logits: np.ndarray) -> int:
        scaled = logits.astype(np.float64) / temperature
        probabilities = np.exp(scaled - scaled.max())
        order = np.argsort(-probabilities, kind="stable")
        shares = np.cumsum(probabilities[order]) / probabilities.sum()
        kept = order[: int(np.searchsorted(shares, top_p)) + 1]
        return int(random.choice(kept, p=probabilities[kept] / probabilities[kept].sum()))

    return sample
