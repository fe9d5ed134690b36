"""Text that a language model samples, and the command that writes it."""

import json

import pytest
import torch

from tests.language_models import make_model, make_tokenizer, save_folder
from vitoats.cli.main import dispatch
from vitoats.common.errors import InputError
from vitoats.models.sampled_text import sampled_texts


def drawn(kind, n, length, seed=0):
    return [text for some in sampled_texts(make_model(kind), make_tokenizer(), n, length, seed) for text in some]


def test_tokens_are_drawn_with_the_models_probabilities():
    n, tokenizer = 2000, make_tokenizer()
    with torch.inference_mode():
        probability = make_model("llama")(torch.tensor([[tokenizer.bos_token_id]])).logits[0, -1].softmax(-1)
    found = torch.zeros_like(probability)
    for text in drawn("llama", n, 1):
        found[tokenizer(text, add_special_tokens=False).input_ids[0]] += 1
    statistic = ((found - n * probability) ** 2 / (n * probability))[n * probability > 5].sum().item()
    degrees = int((n * probability > 5).sum())
    assert degrees > 20
    assert statistic < degrees + 5 * (2 * degrees) ** 0.5  # chi-squared, five standard deviations


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mamba"])
def test_a_seed_gives_the_same_texts_and_leaves_torchs_own_seed_alone(kind):
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    texts = drawn(kind, 18, 6, seed=3)
    assert torch.rand(1) == expected
    assert texts == drawn(kind, 18, 6, seed=3)
    assert texts != drawn(kind, 18, 6, seed=4)
    assert len(set(texts)) == len(texts) == 18  # also across batches


def test_the_file_is_a_source_of_calibration_text(tmp_path):
    folder, file = save_folder(tmp_path / "model"), tmp_path / "sampled.jsonl"
    command = ["sample_lm", "--model", f"local-dir:{folder}", "-n", "6", "--seq-len", "40", "-o", str(file), "--quiet"]
    assert dispatch(command)["tokens"] == 240
    lines = [json.loads(line)["text"] for line in file.read_text().splitlines()]
    assert [len(make_tokenizer()(text, add_special_tokens=False).input_ids) >= 40 for text in lines] == [True] * 6
    with pytest.raises(InputError, match="exists: add `overwrite`"):
        dispatch(command)
    settings = ["--compression", "0.5", "--method", "wanda", "--seq-len", "12", "--nsamples", "8", "--quiet"]
    made = dispatch(
        ["compress", "--model", f"local-dir:{folder}", "--data-dir", str(file), "--output", str(tmp_path / "out"), *settings]
    )
    assert made["compression"] == pytest.approx(0.5, abs=0.02)
