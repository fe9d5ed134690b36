"""Key-value groups and neurons removed from language models."""

import json

import pytest
import torch

from tests.language_models import PROSE, make_model, make_tokenizer, transformers
from vitoats import api
from vitoats.common.errors import InputError
from vitoats.loading import load
from vitoats.models.units import find_units

KINDS = ["llama", "mistral", "qwen2", "qwen3", "phi3", "gemma3_text"]
SIZES = {"num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 32}
TOKENS = torch.arange(5, 35).view(2, 15)


def pruned(kind, compression=0.4, **options):
    """A model, and what is left of it."""
    model = make_model(kind, **SIZES)
    settings = {"method": "numerical", "seq_len": 16, "nsamples": 24, "compression": compression, **options}
    return model, api.compress(model, [PROSE], tokenizer=make_tokenizer(), **settings)


def logits(model):
    with torch.inference_mode():
        return model(input_ids=TOKENS).logits


@pytest.mark.parametrize("kind", KINDS)
def test_a_smaller_model_is_the_dense_one_with_silent_groups(kind):
    model, small = pruned(kind, compensation="none")
    assert {row.kind for row in small.report.modules} == {"groups", "neurons"}
    assert not any("not known" in reason for _, reason in small.report.skipped)
    counts = {row.name: (row.before, row.kept) for row in small.report.modules}
    assert any(kept < 4 for before, kept in counts.values() if before == 4)
    for i in range(2):
        for units in find_units(model, f"model.layers.{i}"):
            weight = model.get_submodule(units.output).weight.data
            left = small.model.get_submodule(units.output).weight.data
            kept = torch.tensor([bool((column[:, None] == left).all(dim=0).any()) for column in weight.T])
            assert int(kept.sum()) == left.shape[1] == units.width * counts[units.module][1]
            weight[:, ~kept] = 0
    torch.testing.assert_close(logits(small.model), logits(model), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_gives_the_same_model_which_generates(tmp_path, kind):
    _, small = pruned(kind)
    small.save(tmp_path / "out")
    loaded = load.load(tmp_path / "out")
    assert torch.equal(logits(loaded), logits(small.model))
    made = loaded.generate(TOKENS, max_new_tokens=4, do_sample=False, pad_token_id=0)
    greedy = TOKENS
    for _ in range(4):
        greedy = torch.cat([greedy, loaded(input_ids=greedy).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(made, greedy)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_number_in_each_block_opens_in_stock_transformers(tmp_path, kind):
    _, small = pruned(kind, cut="equal")
    small.save(tmp_path / "out", format="dense")
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (said["num_attention_heads"], said["num_key_value_heads"]) == (4, 2)
    assert said["intermediate_size"] < 40
    for opened in (transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out"), load.load(tmp_path / "out")):
        torch.testing.assert_close(logits(opened), logits(small.model), atol=1e-5, rtol=1e-5)


def test_different_numbers_do_not(tmp_path):
    _, small = pruned("llama")
    assert len({row.kept for row in small.report.modules if row.kind == "neurons"}) > 1
    with pytest.raises(InputError, match=r"different numbers .*`cut='equal'`"):
        small.save(tmp_path / "out", format="dense")


def test_int8(tmp_path):
    _, small = pruned("llama", weights="int8", cut="equal")
    small.save(tmp_path / "out")
    assert torch.equal(logits(load.load(tmp_path / "out")), logits(small.model))
    small.save(tmp_path / "dense", format="dense")
    torch.testing.assert_close(
        logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")), logits(small.model), atol=0.5, rtol=0.1
    )
