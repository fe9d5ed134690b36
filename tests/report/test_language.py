"""Losses and generated text against independent computations, and the page of a language model."""

import pytest
import torch

from tests.language_models import PROSE, make_model, save_folder
from vitoats.cli.compress import main as compress
from vitoats.cli.report import main as report
from vitoats.report.page.language import FULL, continuation, passage_of, token_losses


def test_losses_are_minus_the_logarithms_of_the_softmax():
    model, tokens = make_model("llama"), torch.randint(4, 90, (9,))
    logits = model(input_ids=tokens[None]).logits[0].double()
    for i, loss in enumerate(token_losses(model, tokens)):
        probability = logits[i].exp()[tokens[i + 1]] / logits[i].exp().sum()
        assert float(loss) == pytest.approx(-float(probability.log()), rel=1e-4)


def test_a_continuation_takes_the_most_probable_token_each_time():
    model, tokens = make_model("llama"), torch.randint(4, 90, (5,))
    found = tokens
    for _ in range(6):
        best = model(input_ids=found[None]).logits[0, -1].argmax()
        found = torch.cat([found, best[None]])
        if int(best) == model.config.eos_token_id:
            break
    assert continuation(model, tokens, 6).tolist() == found[5:].tolist()


def test_a_token_is_coloured_by_what_compression_costs_it():
    losses = {"dense": torch.tensor([1.0, 2.0]), "compressed": torch.tensor([1.0 + FULL / 2, 0.0])}
    shown = passage_of(["a", "b", "c"], losses)
    assert [strength for _, strength, _ in shown.tokens] == [0.0, 0.5, pytest.approx(-2 / FULL)]


def test_the_page_of_a_language_model_has_its_text(succeed, tmp_path):
    model, text, page = save_folder(tmp_path / "model"), tmp_path / "text.txt", tmp_path / "page.html"
    text.write_text(PROSE)
    flags = f"--model local-dir:{model} --data-dir {text} --method oats --iterations 2 --nsamples 16 --seq-len 16 --threads 1"
    result = succeed(compress, *flags.split(), "--output", tmp_path / "out", "--report", page)
    assert result["n_layers"] == 14
    said = page.read_text()
    assert "dense continues" in said
    assert "compressed continues" in said
    assert "add --dense MODEL" not in said
    succeed(report, tmp_path / "out", "--data-dir", text, "-o", page, "--overwrite")
    assert "dense continues" not in page.read_text()
