"""Proves that names, folders and files become the right model, and that bad ones are refused in one line that says why.

Official DINOv2 files are rebuilt from timm models key by key as Meta's files have them, and outputs are compared.
"""

import json
import os
import pickle
import shutil
import warnings
from argparse import Namespace

import numpy as np
import pytest
import safetensors.torch
import torch

from tests.conftest import make_tiny
from vitoats.cli.common import run
from vitoats.cli.compress import main as compress
from vitoats.common.errors import InputError
from vitoats.loading.load import load_model
from vitoats.loading.weights import read_content

import timm  # isort: skip
from timm.models import save_for_hf  # isort: skip


@torch.inference_mode()
def outputs(model, img_size=32):
    return model.eval()(
        torch.randn(1 if img_size > 300 else 2, 3, img_size, img_size, generator=torch.Generator().manual_seed(1))
    )


def refusal(name, **settings) -> str:
    """The message of the error that loading raises; always one line."""
    with pytest.raises(InputError) as error:
        load_model(name, **settings)
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 700
    return message


def edited(folder, target, edit):
    """A copy of a model folder whose tensors went through ``edit``."""
    shutil.copytree(folder, target)
    state = safetensors.torch.load_file(str(target / "model.safetensors"))
    edit(state)
    safetensors.torch.save_file(state, str(target / "model.safetensors"), metadata={"format": "pt"})
    return target


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


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


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


# ---- --checkpoint: what training loops write

WRAPPINGS = {
    "plain": lambda s: s,
    "under state_dict": lambda s: {"state_dict": s, "epoch": 3},
    "under model": lambda s: {"model": s, "epoch": 3},
    "module. prefixes": lambda s: {f"module.{k}": v for k, v in s.items()},
    "compiled prefixes": lambda s: {f"_orig_mod.{k}": v for k, v in s.items()},
    "EMA goes first": lambda s: {"state_dict": {k: v + 1 for k, v in s.items()}, "state_dict_ema": s},
    "EMA with prefixes": lambda s: {
        "state_dict": {f"module.{k}": v + 1 for k, v in s.items()},
        "state_dict_ema": {f"module.{k}": v for k, v in s.items()},
        "args": Namespace(lr=0.1),
    },
}


def write_checkpoint(state, path):
    if path.suffix == ".safetensors":
        safetensors.torch.save_file({k: v.contiguous() for k, v in state.items()}, str(path))
    else:
        torch.save(state, path)
    return path


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


class Evil:
    """Unpickled, it would make a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def write_bad(kind, path, marker):
    if kind == "code in a zip":
        torch.save({"weight": Evil(marker)}, path)
    elif kind == "code in an old pickle":
        path.write_bytes(pickle.dumps(Evil(marker), protocol=2))
    elif kind == "code in a new pickle":
        path.write_bytes(pickle.dumps(Evil(marker), protocol=4))
    elif kind == "a whole module":
        torch.save(make_tiny(), path)
    elif kind == "cut short":
        torch.save(make_tiny().state_dict(), path)
        cut(path)
    elif kind == "empty file":
        path.write_bytes(b"")
    elif kind == "noise":
        path.write_bytes(bytes(range(256)) * 20)
    elif kind == "no tensors":
        torch.save({"a": 1}, path)
    else:
        torch.save({"an empty dict": {}, "a list": [1, 2, 3], "text": "hello"}[kind], path)


BAD_FILES = (
    "code in a zip", "code in an old pickle", "code in a new pickle", "a whole module", "cut short", "empty file", "noise",
    "no tensors", "an empty dict", "a list", "text",
)  # fmt: skip


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


# ---- official DINOv2 files


def official(model, registers=False, swiglu=False):
    """A timm DINOv2 model's weights as Meta's files name them."""
    state = {k: v.clone() for k, v in model.state_dict().items()}
    width = model.embed_dim
    if registers:  # timm adds the class token's own position to the class token; Meta keeps it in pos_embed
        own = 0.1 * torch.randn(1, 1, width)
        state["register_tokens"] = state.pop("reg_token")
        state["cls_token"] = state["cls_token"] - own
        state["pos_embed"] = torch.cat([own, state["pos_embed"]], dim=1)
    if swiglu:
        renamed = {"mlp.fc1": "mlp.w12", "mlp.fc2": "mlp.w3"}
        for ours, theirs in renamed.items():
            state = {k.replace(ours, theirs): v for k, v in state.items()}
    assert state["pos_embed"].shape == (1, 1 + 37 * 37, width)
    return state | {"mask_token": torch.zeros(1, width)}


def randomised(model):
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    return model.eval()


@pytest.mark.parametrize(
    ("name", "architecture"),
    [("dinov2_vits14", "vit_small_patch14_dinov2"), ("dinov2_vits14_reg", "vit_small_patch14_reg4_dinov2")],
)
def test_official_files_give_the_models_outputs(tmp_path, name, architecture):
    registers = name.endswith("_reg")
    model = randomised(timm.create_model(architecture, num_classes=0))  # 518 px, as it was trained
    path = write_checkpoint(official(model, registers), tmp_path / f"{name}_pretrain.pth")

    full = load_model(name, checkpoint=path, img_size=518)
    torch.testing.assert_close(outputs(full.model, 518), outputs(model, 518), rtol=1e-4, atol=1e-4)

    usual = load_model(name, checkpoint=path, pos_resample="timm")  # 224 px
    assert (usual.preprocessing.img_size, usual.preprocessing.crop_pct) == (224, 224 / 256)
    assert usual.preprocessing.interpolation == "bicubic"
    model.set_input_size((224, 224))
    torch.testing.assert_close(outputs(usual.model, 224), outputs(model, 224), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("registers", [False, True])
def test_official_files_of_the_giant_architecture(tmp_path, registers):
    """w12 and w3 of its SwiGLU; a narrow model of that architecture stands for the 4.5 GB one."""
    architecture = "vit_giant_patch14_reg4_dinov2" if registers else "vit_giant_patch14_dinov2"
    model = randomised(timm.create_model(architecture, num_classes=0, embed_dim=48, depth=2, num_heads=3))
    save_for_hf(timm.create_model(architecture, num_classes=0, embed_dim=48, depth=2, num_heads=3), str(tmp_path / "narrow"))
    path = write_checkpoint(official(model, registers, swiglu=True), tmp_path / "official.pth")
    loaded = load_model(f"local-dir:{tmp_path / 'narrow'}", checkpoint=path)
    torch.testing.assert_close(outputs(loaded.model, 518), outputs(model, 518), rtol=1e-4, atol=1e-4)


def test_an_official_file_under_another_name_is_refused(tmp_path):
    model = timm.create_model("vit_small_patch14_reg4_dinov2", num_classes=0)
    path = write_checkpoint(official(model, registers=True), tmp_path / "reg.pth")
    for name in ("dinov2_vits14", "dinov2_vitb14_reg"):
        message = refusal(name, checkpoint=path)
        assert str(path) in message
        assert f"do not fit {name}" in message


# ---- settings that a model cannot follow are refused, not ignored


@pytest.fixture(scope="module")
def compressed(tiny_folder, flat_images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compressed") / "out"
    flags = f"--model local-dir:{tiny_folder} --data-dir {flat_images} --output {folder} --iterations 3 --threads 1 --quiet"
    assert run(compress, flags.split()) == 0
    return folder


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"img_size": 50}, "`img_size`"),  # its patches are 8 px
        ({"checkpoint": "w.pth"}, "`checkpoint`"),
        ({"random_weights": True}, "`random_weights`"),
    ],
)
def test_a_compressed_folder_keeps_its_weights_and_size(compressed, tmp_path, settings, said):
    if "checkpoint" in settings:
        settings = {"checkpoint": write_checkpoint(make_tiny().state_dict(), tmp_path / "w.pth")}
    assert said in refusal(str(compressed), **settings)


def test_the_embedded_model_takes_no_other_weights(tmp_path):
    path = write_checkpoint({"a": torch.zeros(1)}, tmp_path / "w.pth")
    assert "`checkpoint`" in refusal("dinov2s_derived", checkpoint=path)


def test_embedded_model_with_random_weights_says_so_and_is_random():
    """Either refused, or really random: not the true weights under another flag."""
    try:
        random = load_model("dinov2s_derived", random_weights=True)
    except InputError as error:
        random, refused = None, str(error)
    if random is None:
        assert "`random_weights`" in refused
        return
    true = load_model("dinov2s_derived")
    assert not torch.equal(random.timm_model.state_dict()["norm.weight"], true.timm_model.state_dict()["norm.weight"])
    assert "random" in random.weights


def edit_about(folder, **values):
    about = json.loads((folder / "vitoats.json").read_text())
    (folder / "vitoats.json").write_text(json.dumps(about | values))


def rename_layer(folder):
    blocks = json.loads((folder / "vitoats.json").read_text())["row_blocks"]
    edit_about(folder, row_blocks={k.replace("fc1", "fc9"): v for k, v in blocks.items()})


DAMAGED = {
    "cut weights": lambda f: cut(f / "model.safetensors"),
    "no weights": lambda f: (f / "model.safetensors").unlink(),
    "no config": lambda f: (f / "config.json").unlink(),
    "about is no json": lambda f: (f / "vitoats.json").write_text("{"),
    "about is a list": lambda f: (f / "vitoats.json").write_text("[]"),
    "about is binary": lambda f: (f / "vitoats.json").write_bytes(b"\x89\xff\x00"),
    "about is empty": lambda f: (f / "vitoats.json").write_text("{}"),
    "newer format": lambda f: edit_about(f, format_version=99),
    "no row blocks": lambda f: edit_about(f, row_blocks={}),
    "other row blocks": lambda f: edit_about(f, row_blocks={"blocks.0.attn.qkv": [[48, 2]]}),
    "row blocks of nonsense": lambda f: edit_about(f, row_blocks={"blocks.0.attn.qkv": [["x", 2]]}),
    "unknown layer": rename_layer,
    "preprocessing is missing": lambda f: edit_about(f, preprocessing={}),
    "image size is text": lambda f: edit_about(
        f, preprocessing=json.loads((f / "vitoats.json").read_text())["preprocessing"] | {"img_size": "x"}
    ),
    "crop share is zero": lambda f: edit_about(
        f, preprocessing=json.loads((f / "vitoats.json").read_text())["preprocessing"] | {"crop_pct": 0}
    ),
    "head is noise": lambda f: (f / "head.safetensors").write_bytes(b"noise"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_compressed_folders(compressed, tmp_path, damage):
    folder = tmp_path / "copy"
    shutil.copytree(compressed, folder)
    DAMAGED[damage](folder)
    assert str(folder) in refusal(str(folder))


def test_compressed_folder_loads_without_any_warning(compressed):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load_model(str(compressed))
    assert outputs(loaded.model).shape == (2, 4)
    assert loaded.preprocessing.img_size == 32
