"""Compressed folders and the embedded model keep what they were made with; damaged folders are refused in one line."""

import json
import shutil
import warnings

import pytest
import torch

from tests.conftest import make_tiny
from tests.loading.files import cut, outputs, refusal, write_checkpoint
from vitoats.cli.common import run
from vitoats.cli.compress import main as compress
from vitoats.common.errors import InputError
from vitoats.loading.load import load_model


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
    "format of nonsense": lambda f: edit_about(f, format_version=[0] * 1000),
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
