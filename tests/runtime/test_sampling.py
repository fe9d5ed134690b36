"""The choice of tokens, against probabilities by hand."""

import numpy as np
import pytest

from vitoats.common.errors import InputError
from vitoats.runtime.sampling import greedy, top_p_sampler

LOGITS = np.log(np.array([0.1, 0.5, 0.05, 0.35], np.float32))


def shares(sampler, n=4000):
    return np.bincount([sampler(LOGITS) for _ in range(n)], minlength=4) / n


def test_greedy_takes_the_most_probable_token():
    assert greedy(LOGITS) == top_p_sampler(0)(LOGITS) == 1


def test_tokens_are_drawn_by_their_probabilities():
    assert shares(top_p_sampler(1.0)) == pytest.approx([0.1, 0.5, 0.05, 0.35], abs=0.03)
    squared = np.array([0.1, 0.5, 0.05, 0.35]) ** 2
    assert shares(top_p_sampler(0.5)) == pytest.approx(squared / squared.sum(), abs=0.03)


def test_only_the_most_probable_tokens_are_drawn():
    assert shares(top_p_sampler(1.0, 0.45)) == pytest.approx([0, 1, 0, 0])
    assert shares(top_p_sampler(1.0, 0.6)) == pytest.approx([0, 0.5 / 0.85, 0, 0.35 / 0.85], abs=0.03)


def test_the_same_seed_draws_the_same_tokens():
    first, second = top_p_sampler(1.0, seed=3), top_p_sampler(1.0, seed=3)
    assert [first(LOGITS) for _ in range(20)] == [second(LOGITS) for _ in range(20)]


@pytest.mark.parametrize(("temperature", "top_p"), [(-1, 1), (float("nan"), 1), (1, 0), (1, 1.1)])
def test_numbers_out_of_range_are_refused(temperature, top_p):
    with pytest.raises(InputError):
        top_p_sampler(temperature, top_p)
