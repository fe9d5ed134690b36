"""Perplexity with a sliding window, against a loop over single tokens."""

import json
import math

import pytest
import torch

from tests.language_models import PROSE, VOCABULARY, make_model, make_tokenizer, save_folder
from vitoats.cli.eval_perplexity import main as eval_perplexity
from vitoats.common import unfinished
from vitoats.common.errors import InputError
from vitoats.evaluation.perplexity import perplexity, read_test_text, unfinished_perplexity


@pytest.fixture(scope="module")
def model():
    return make_model("llama")


def text(n):
    return read_test_text([PROSE], make_tokenizer(), VOCABULARY, n)


@torch.inference_mode()
def one_by_one(model, tokens, context, stride):
    """Each token's negative log-likelihood, from a window of its own."""
    found = []
    for i in range(1, len(tokens)):
        first = max(0, -(-(i + 1 - context) // stride) * stride)  # where the window that scores token i begins
        if i == first:  # windows that do not overlap know nothing before their first token
            continue
        logits = model(input_ids=tokens[None, first:i]).logits[0, -1]
        found.append(-logits.log_softmax(dim=-1)[tokens[i]].item())
    return found


@pytest.mark.parametrize(
    ("n", "context", "stride"), [(40, 16, 8), (41, 16, 5), (45, 16, 16), (10, 16, 8), (33, 16, 1), (17, 16, 8)]
)
def test_each_token_is_predicted_once_from_its_window(model, n, context, stride):
    read = text(n)
    found = perplexity(model, read, context, stride, batch_size=3)
    expected = one_by_one(model, read.tokens, context, stride)
    assert found.tokens == len(expected)
    assert math.isclose(found.total, sum(expected), rel_tol=1e-4)
    assert math.isclose(found.per_token, math.exp(sum(expected) / len(expected)), rel_tol=1e-4)
    assert math.isclose(found.per_word, math.exp(sum(expected) / read.words), rel_tol=1e-3)


def test_the_paired_difference_is_much_surer_than_the_perplexity(model):
    other = make_model("llama")
    other.lm_head.weight.data *= 1.01
    read = text(400)
    dense, changed = (perplexity(m, read, 16, 8) for m in (model, other))
    difference, error = changed.against(dense)
    assert dense.against(dense) == (0, 0)
    assert error < dense.standard_error / dense.per_token / 10
    assert math.isclose(difference, float((changed.nll - dense.nll).mean()), rel_tol=1e-6)


def test_a_single_window_has_no_standard_error(model):
    found = perplexity(model, text(12), 16, 8)
    assert len(found.nll) == 1
    assert found.to_dict()["perplexity_se"] is None
    assert found.against(found) == (0, None)


@pytest.mark.parametrize(("context", "stride"), [(1, 1), (16, 17), (16, 0)])
def test_windows_that_cannot_be(model, context, stride):
    with pytest.raises(InputError, match="cannot move by"):
        perplexity(model, text(40), context, stride)


def test_a_text_without_tokens_is_refused():
    with pytest.raises(InputError, match="fewer than 2 tokens"):
        read_test_text([" "], make_tokenizer(), VOCABULARY)
    with pytest.raises(InputError, match="the model knows 20"):
        read_test_text([PROSE], make_tokenizer(), 20)


def test_the_command_measures_against_a_dense_model(succeed, tmp_path):
    folder, prose = save_folder(tmp_path / "lm"), tmp_path / "prose.txt"
    prose.write_text(PROSE)
    flags = ["--model", f"local-dir:{folder}", "--data-dir", prose, "--context", 16, "--max-tokens", 200]
    line = succeed(eval_perplexity, *flags, "--against", f"local-dir:{folder}")
    assert line["stride"] == 8
    assert line["n_tokens"] == 199
    assert line["log_difference"] == 0
    assert line["perplexity"] == line["against_perplexity"]
    assert json.dumps(line)


def test_an_interrupted_measurement_goes_on_and_gives_the_same(model, monkeypatch):
    monkeypatch.setattr(unfinished, "SECONDS", 0.0)
    read = text(200)
    whole = perplexity(model, read, 16, 8, batch_size=3)
    for stop_at in (3, 12):
        seen = []

        def stop(done, _n, seen=seen, stop_at=stop_at):
            seen.append(done)
            if done == stop_at:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            perplexity(model, read, 16, 8, 3, stop, unfinished_perplexity("digest", read, 16, 8, 3))
        assert seen[-1] == stop_at
    again = perplexity(model, read, 16, 8, 3, unfinished=unfinished_perplexity("digest", read, 16, 8, 3))
    assert torch.equal(again.nll, whole.nll)
    assert torch.equal(again.scored, whole.scored)
    assert len(seen) == 3  # windows 4 to 12, after the first three
    assert not unfinished_perplexity("another model", read, 16, 8, 3).parts
