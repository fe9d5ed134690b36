"""Random weights take the place of those that cannot be fetched, and of no others."""

import logging

import pytest
import torch

from vitoats.benchmark.weights import load_or_randomise
from vitoats.common.errors import InputError
from vitoats.loading.source import ModelSource


@pytest.fixture(autouse=True)
def _offline(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    caplog.set_level(logging.WARNING, "vitoats")


def test_weights_that_cannot_be_fetched_become_random_ones_with_a_warning(caplog):
    loaded, weights = load_or_randomise(ModelSource(name="vit_tiny_patch16_224", img_size=32))
    assert weights == "random weights"
    assert loaded.preprocessing.img_size == 32
    assert "cannot be fetched" in caplog.text


def test_a_model_keeps_the_weights_it_has(tiny_folder, tiny, caplog):
    loaded, weights = load_or_randomise(ModelSource(name=f"local-dir:{tiny_folder}"))
    assert str(tiny_folder) in weights
    assert torch.equal(loaded.model.blocks[0].mlp.fc1.weight, tiny.blocks[0].mlp.fc1.weight)
    assert caplog.text == ""


def test_random_weights_are_taken_when_asked_for(tiny_folder, tiny, caplog):
    loaded, weights = load_or_randomise(ModelSource(name=f"local-dir:{tiny_folder}", random_weights=True))
    assert weights == "random weights"
    assert not torch.equal(loaded.model.blocks[0].mlp.fc1.weight, tiny.blocks[0].mlp.fc1.weight)
    assert caplog.text == ""


def test_other_errors_stay_errors(tmp_path):
    (tmp_path / "broken.pth").write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"broken\.pth"):
        load_or_randomise(ModelSource(name="vit_tiny_patch16_224", checkpoint=tmp_path / "broken.pth"))
    with pytest.raises(InputError, match="vit_tiny_patch16_224"):
        load_or_randomise(ModelSource(name="vit_tiny_patch16_225"))
