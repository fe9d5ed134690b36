"""Weights of another image size, patch size, channel or class count: said, taken over or refused, never changed silently."""

import json
import logging
import shutil

import pytest
import safetensors.torch
import torch

from tests.conftest import TINY, make_tiny
from vitoats.common.errors import InputError
from vitoats.loading.load import load_model

import timm  # isort: skip
from timm.models import save_for_hf  # isort: skip

NAME = "vit_tiny_patch16_224"


@pytest.fixture(autouse=True)
def _log(caplog):
    caplog.set_level(logging.INFO, "vitoats")


def weights(path, name=NAME, **arguments):
    """A file with the random weights of a timm model, and the model."""
    torch.manual_seed(1)
    model = timm.create_model(name, **arguments).eval()
    safetensors.torch.save_file(model.state_dict(), str(path / "w.safetensors"))
    return path / "w.safetensors", model


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@torch.inference_mode()
def same(one, other, size):
    images = torch.randn(2, 3, size, size)
    return torch.equal(one(images), other(images))


def test_the_size_of_a_checkpoint_is_taken_over(tmp_path, caplog):
    file, model = weights(tmp_path, img_size=48)
    loaded = load_model(NAME, checkpoint=file)
    assert loaded.preprocessing.img_size == 48
    assert same(loaded.model, model, 48)
    assert f"the weights {file} are for images of 48 px" in caplog.text
    assert warnings_of(caplog) == []


def test_a_size_that_is_given_wins_and_the_change_is_said(tmp_path, caplog):
    file, _ = weights(tmp_path, img_size=48)
    loaded = load_model(NAME, checkpoint=file, img_size=32)
    assert loaded.preprocessing.img_size == 32
    assert "resized to fit the model: positions of 3 x 3 patches to 2 x 2;" in caplog.text
    assert warnings_of(caplog) == []  # it was asked for


def test_weights_of_the_usual_size_are_as_they_were(tmp_path, caplog):
    file, model = weights(tmp_path)
    loaded = load_model(NAME, checkpoint=file)
    assert loaded.preprocessing.img_size == 224
    assert all(torch.equal(a, b) for a, b in zip(loaded.model.state_dict().values(), model.state_dict().values(), strict=True))
    assert "px" not in caplog.text
    assert "classes" not in caplog.text


def test_another_patch_size_is_a_warning_even_if_the_image_size_is_given(tmp_path, caplog):
    file, _ = weights(tmp_path, img_size=32, patch_size=8)
    load_model(NAME, checkpoint=file, img_size=64)
    (said,) = warnings_of(caplog)
    assert "patches of 8 x 8 pixels to 16 x 16" in said
    assert "positions" not in said  # 4 x 4 of them, before and after


@pytest.mark.filterwarnings("ignore::UserWarning")  # of torch, about how timm resizes
def test_tables_of_relative_positions_are_said(tmp_path, caplog):
    small = {"img_size": 32, "embed_dim": 24, "depths": (1, 1), "num_heads": (2, 4), "num_classes": 3}
    swin = "swin_tiny_patch4_window7_224"
    save_for_hf(timm.create_model(swin, **small, window_size=4), str(tmp_path / "model"), safe_serialization=True)
    file, _ = weights(tmp_path, swin, **small, window_size=2)
    load_model(f"local-dir:{tmp_path / 'model'}", checkpoint=file)
    (said,) = warnings_of(caplog)
    assert "2 tables of relative positions" in said


@pytest.mark.parametrize("channels", [1, 4])
def test_other_channels_are_refused(tmp_path, channels):
    file, _ = weights(tmp_path, img_size=32, in_chans=channels)
    with pytest.raises(InputError, match=f"take {channels}-channel images, the model 3-channel ones"):
        load_model(NAME, checkpoint=file, img_size=32)


@pytest.mark.parametrize(("n_classes", "said"), [(7, "a classifier of 7 classes"), (0, "no classifier")])
def test_other_classes_are_said(tmp_path, caplog, n_classes, said):
    file, _ = weights(tmp_path, img_size=32, num_classes=n_classes)
    assert load_model(NAME, checkpoint=file, img_size=32).n_classes == n_classes
    assert f"have {said}" in caplog.text
    assert "usually has 1000 classes" in caplog.text


@pytest.fixture
def folder(tiny_folder, tmp_path):
    return shutil.copytree(tiny_folder, tmp_path / "copy")


def test_the_weights_of_a_folder_decide_its_size_too(folder, caplog):
    torch.manual_seed(1)
    larger = timm.create_model(NAME, **(TINY | {"img_size": 48})).eval()
    safetensors.torch.save_file(larger.state_dict(), str(folder / "model.safetensors"), metadata={"format": "pt"})
    loaded = load_model(f"local-dir:{folder}")
    assert loaded.preprocessing.img_size == 48
    assert same(loaded.model, larger, 48)
    assert "are for images of 48 px" in caplog.text
    load_model(f"local-dir:{folder}", img_size=32)
    assert "positions of 6 x 6 patches to 4 x 4" in caplog.text


def test_a_folder_that_fits_says_nothing(folder, caplog):
    assert same(load_model(f"local-dir:{folder}").model, make_tiny(), 32)
    assert caplog.text == ""


def test_two_class_counts_in_a_folder_are_refused(folder):
    """timm would drop the classifier and take a random one."""
    config = json.loads((folder / "config.json").read_text())
    config["model_args"] = config["model_args"] | {"num_classes": 9}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="says both 4 and 9 classes"):
        load_model(f"local-dir:{folder}")
