"""Names and timm folders become the right model, and bad ones are refused in one line that says why."""

import json
import shutil

import pytest
import torch

from tests.conftest import make_tiny
from tests.loading.files import cut, edited, outputs, refusal
from vitoats.loading.load import load_model

# ---- names


@pytest.mark.parametrize(
    ("name", "said"),
    [
        # near misses name what is near
        ("vit_tiny_patch16_225", "vit_tiny_patch16_224"),
        ("dinov2_vitb15", "dinov2_vitb14"),
        ("dinov2s_derive", "dinov2s_derived"),
        ("dinov2_vits14_regs", "dinov2_vits14_reg"),
        # nothing near: say what kinds of names there are
        ("zzzzz", "local-dir:"),
        # a tag that the architecture does not have
        ("vit_tiny_patch16_224.augreg_in21", "vit_tiny_patch16_224.augreg_in21k"),
        # folders
        ("no/such/folder", "no model folder no/such/folder"),
        ("./nowhere", "no model folder"),
        ("local-dir:/no/such", "config.json"),
        ("", "`model`"),
        ("hf-hub:", "hf-hub:"),
    ],
)
def test_wrong_names_say_what_to_use(name, said, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert said in refusal(name)


def test_a_timm_folder_without_its_prefix_is_pointed_to_it(tiny_folder):
    assert f"local-dir:{tiny_folder}" in refusal(str(tiny_folder))


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("dinov2_vitg14_reg", "dinov2_vitg14_reg4_pretrain.pth"),
        ("dinov2_vitl14", "dinov2_vitl14_pretrain.pth"),
        ("vit_huge_patch14_clip_336.laion2b_ft_in12k_in1k", "vit_huge_patch14_clip_336.laion2b_ft_in12k_in1k"),
        ("hf-hub:vitoats-tests/there-is-none", "vitoats-tests/there-is-none"),
    ],
)
def test_weights_that_cannot_be_fetched_name_the_file_and_the_way_out(name, file, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    message = refusal(name)
    for part in (file, "cannot be fetched", "`checkpoint`", "local-dir:"):
        assert part in message


def test_random_weights_fetch_nothing(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    loaded = load_model("vit_tiny_patch16_224", random_weights=True, img_size=32)
    assert loaded.weights == "random weights"
    assert outputs(loaded.model).shape == (2, 1000)


# ---- timm folders


def test_local_dir_is_the_model_that_was_saved(tiny_folder):
    loaded = load_model(f"local-dir:{tiny_folder}")
    torch.testing.assert_close(outputs(loaded.model), outputs(make_tiny()), rtol=0, atol=0)
    assert (loaded.preprocessing.img_size, loaded.preprocessing.crop_mode) == (32, "center")
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())


def test_image_size_and_crop_mode(tiny_folder):
    loaded = load_model(f"local-dir:{tiny_folder}", img_size=48, crop_mode="squash")
    assert (loaded.preprocessing.img_size, loaded.preprocessing.crop_mode, loaded.preprocessing.crop_pct) == (48, "squash", 1)
    assert loaded.timm_model.pos_embed.shape[1] == 1 + 36
    assert outputs(loaded.model, 48).shape == (2, 4)
    assert loaded.preprocessing.transform()


@pytest.mark.parametrize("img_size", [0, -32, 7])
def test_image_sizes_that_cannot_be_are_refused(tiny_folder, img_size):
    assert "`img_size`" in refusal(f"local-dir:{tiny_folder}", img_size=img_size)


def edit_config(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


DAMAGED_FOLDERS = {
    "cut weights": (lambda f: cut(f / "model.safetensors"), "model.safetensors"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "weights"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json"),
    "config is not json": (lambda f: (f / "config.json").write_text("{not json"), "config.json"),
    "config is a list": (lambda f: (f / "config.json").write_text("[1]"), "config.json"),
    "unknown architecture": (lambda f: edit_config(f, architecture="vit_nope"), "vit_nope"),
}


@pytest.mark.parametrize("damage", DAMAGED_FOLDERS)
def test_damaged_timm_folders(tiny_folder, tmp_path, damage):
    change, said = DAMAGED_FOLDERS[damage]
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    change(folder)
    message = refusal(f"local-dir:{folder}")
    assert said in message
    assert str(folder) in message


MISFITS = {
    "wrong shape": (lambda s: s.update({"blocks.1.mlp.fc1.weight": torch.zeros(7, 48)}), "blocks.1.mlp.fc1.weight"),
    "a tensor is missing": (lambda s: s.pop("blocks.2.norm1.bias"), "blocks.2.norm1.bias"),
    "a tensor too many": (lambda s: s.update({"foo": torch.zeros(3)}), "foo"),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_weights_that_do_not_fit_the_architecture(tiny_folder, tmp_path, misfit):
    edit, said = MISFITS[misfit]
    folder = edited(tiny_folder, tmp_path / "model", edit)
    message = refusal(f"local-dir:{folder}")
    assert said in message
    assert str(folder) in message
    assert "  " not in message  # no gap where the name of a file is missing


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("key", ["blocks.1.mlp.fc1.weight", "pos_embed", "head.bias"])
def test_weights_that_are_not_finite(tiny_folder, tmp_path, key, value):
    folder = edited(tiny_folder, tmp_path / "model", lambda s: s[key].view(-1)[3:4].fill_(value))
    message = refusal(f"local-dir:{folder}")
    assert key in message
    assert "not finite" in message
