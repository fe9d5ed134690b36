"""Checkpoint files as training loops write them: wrapped weights load as they were, bad files are named and never run."""

import pickle

import numpy as np
import pytest
import torch

from tests.conftest import make_tiny
from tests.loading.files import BAD_FILES, WRAPPINGS, Evil, cut, outputs, refusal, write_bad, write_checkpoint
from vitoats.loading.load import load_model
from vitoats.loading.weights import read_content

import timm  # isort: skip


@pytest.mark.parametrize("ending", [".pth", ".pt", ".bin", ".safetensors"])
def test_kinds_of_files(tmp_path, ending):
    state = make_tiny().state_dict()
    read = read_content(write_checkpoint(state, tmp_path / f"w{ending}"))
    assert read.keys() == state.keys()
    assert all(torch.equal(read[k], state[k]) for k in state)


@pytest.fixture(scope="module")
def vit():
    """A timm architecture by name, 32 px, with a classifier of 7 classes."""
    torch.manual_seed(3)
    return timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=7).eval()


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_wrapped_weights_load_as_they_were(vit, tmp_path, wrapping):
    path = write_checkpoint(WRAPPINGS[wrapping](vit.state_dict()), tmp_path / "w.pth")
    loaded = load_model("vit_tiny_patch16_224", checkpoint=path, img_size=32)
    assert torch.equal(outputs(loaded.model), outputs(vit))  # the class count comes from the file too
    assert loaded.weights == str(path)


@pytest.mark.parametrize("wrapping", ["plain", "EMA with prefixes"])
def test_a_checkpoint_replaces_the_weights_of_a_timm_folder(tiny_folder, tmp_path, wrapping):
    other = {k: v + 0.1 for k, v in make_tiny().state_dict().items()}
    path = write_checkpoint(WRAPPINGS[wrapping](other), tmp_path / "w.pth")
    loaded = load_model(f"local-dir:{tiny_folder}", checkpoint=path)
    expected = make_tiny()
    expected.load_state_dict(other)
    assert torch.equal(outputs(loaded.model), outputs(expected))


def test_a_backbone_without_classifier_loads_under_a_classifiers_name(tmp_path):
    backbone = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0).eval()
    path = write_checkpoint(backbone.state_dict(), tmp_path / "w.safetensors")
    loaded = load_model("vit_tiny_patch16_224", checkpoint=path, img_size=32)
    assert torch.equal(outputs(loaded.model), outputs(backbone))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", BAD_FILES)
@pytest.mark.parametrize("name", ["dinov2_vits14", "local-dir"])
def test_bad_checkpoints_are_named_and_never_run(tiny_folder, tmp_path, name, kind, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    path, marker = tmp_path / "bad.pth", tmp_path / "this was run"
    write_bad(kind, path, marker)
    message = refusal(f"local-dir:{tiny_folder}" if name == "local-dir" else name, checkpoint=path)
    assert not marker.exists()
    assert str(path) in message
    assert "weights_only=False" not in message  # advice for programmers, and bad advice


@pytest.mark.parametrize("kind", ["cut short", "empty", "a pickle inside"])
def test_bad_safetensors(tmp_path, kind):
    path = tmp_path / "bad.safetensors"
    write_checkpoint(make_tiny().state_dict(), path)
    if kind == "cut short":
        cut(path)
    else:
        path.write_bytes(b"" if kind == "empty" else pickle.dumps(Evil(tmp_path / "x")))
    assert str(path) in refusal("dinov2_vits14", checkpoint=path)
    assert not (tmp_path / "x").exists()


def torchscript(path):
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), str(path))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "write", "said"),
    [
        ("w.pth", lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "git lfs pull"),
        ("w.safetensors", lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
        ("w.pth", lambda path: path.write_text("<!DOCTYPE html><html>404</html>"), "it is a web page"),
        ("w.npz", lambda path: np.savez(path, a=np.ones(2)), "arrays of NumPy"),
        ("w.pt", torchscript, "it is TorchScript: save its state_dict()"),
        ("w.pth", lambda path: torch.save({"cls_token": torch.eye(2).to_sparse()}, path), "a sparse tensor, cls_token"),
    ],
)
def test_other_kinds_of_files_are_named(tmp_path, name, write, said):
    write(tmp_path / name)
    assert said in refusal("vit_tiny_patch16_224", checkpoint=tmp_path / name)


def test_no_such_checkpoint(tmp_path):
    assert f"no checkpoint file {tmp_path / 'none.pth'}" in refusal("dinov2_vits14", checkpoint=tmp_path / "none.pth")
    assert "`checkpoint`" in refusal("dinov2_vits14", checkpoint=tmp_path)  # a folder


def test_a_checkpoint_of_another_model(vit, tmp_path):
    path = write_checkpoint(vit.state_dict(), tmp_path / "w.pth")
    message = refusal("vit_small_patch16_224", checkpoint=path, img_size=32)
    assert str(path) in message
    assert "do not fit vit_small_patch16_224" in message


def test_a_checkpoint_that_is_not_finite(vit, tmp_path):
    state = {k: v.clone() for k, v in vit.state_dict().items()}
    state["blocks.3.attn.qkv.weight"][0, 0] = float("nan")
    path = write_checkpoint(state, tmp_path / "w.pth")
    assert "blocks.3.attn.qkv.weight" in refusal("vit_tiny_patch16_224", checkpoint=path, img_size=32)
