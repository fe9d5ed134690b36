"""The checkpoint folder: bit-equal round trips, timm opens the dense form, damage is refused, nothing is half-written."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vitoats
from tests.in_place import compress_in_place, job_of
from vitoats.common.errors import InputError
from vitoats.loading.checkpoint import save_checkpoint
from vitoats.loading.load import load_model
from vitoats.methods.oats import OATSConfig

import timm  # isort: skip


def compressed(tiny_folder, **kwargs):
    loaded = load_model(f"local-dir:{tiny_folder}")
    images = torch.randn(8, 3, 32, 32)
    report = compress_in_place(loaded.timm_model, images, job_of("oats", OATSConfig(iterations=5, **kwargs)))
    return loaded, report


@pytest.mark.parametrize(
    "settings",
    [{}, {"rank_ratio": 0.0}, {"rank_ratio": 1.0}, {"compression": None, "pattern": "2:4"}],
    ids=["S and UV", "S only", "UV only", "2:4"],
)
def test_round_trip_is_bit_equal(tiny_folder, tmp_path, settings):
    loaded, report = compressed(tiny_folder, **settings)
    save_checkpoint(loaded, tmp_path / "out", report.to_dict())
    model = vitoats.load(tmp_path / "out")
    expected, found = loaded.model.state_dict(), model.state_dict()
    assert expected.keys() == found.keys()
    for key, tensor in expected.items():
        assert tensor.dtype == found[key].dtype
        assert torch.equal(tensor, found[key]), key
    images = torch.randn(3, 3, 32, 32)
    assert torch.equal(model(images), loaded.model(images))
    again = load_model(str(tmp_path / "out"))
    assert again.preprocessing == loaded.preprocessing
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "vitoats.json",
    ]
    assert not list(tmp_path.glob(".*"))


def test_dense_opens_in_stock_timm(tiny_folder, tmp_path):
    loaded, report = compressed(tiny_folder)
    save_checkpoint(loaded, tmp_path / "dense", report.to_dict(), dense=True)
    code = f"""
import vitoats.common.torchvision_ops, sys, timm, torch
assert "vitoats.loading" not in sys.modules
model = timm.create_model("local-dir:{tmp_path / "dense"}", pretrained=True).eval()
torch.save(model(torch.load("{tmp_path / "images.pt"}")), "{tmp_path / "logits.pt"}")
"""
    images = torch.randn(3, 3, 32, 32)
    torch.save(images, tmp_path / "images.pt")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent.parent)
    logits = torch.load(tmp_path / "logits.pt", weights_only=True)
    assert torch.allclose(logits, loaded.model(images), atol=1e-5)
    assert torch.allclose(vitoats.load(tmp_path / "dense")(images), logits, atol=1e-5)


def test_factored_is_smaller_by_what_was_removed(tiny_folder, tmp_path):
    loaded, report = compressed(tiny_folder)
    save_checkpoint(loaded, tmp_path / "factored", report.to_dict())
    save_checkpoint(loaded, tmp_path / "dense", report.to_dict(), dense=True)
    sizes = [(tmp_path / f / "model.safetensors").stat().st_size for f in ("factored", "dense")]
    expected = sum(4 * (r.d_out * r.d_in - r.kept_parameters) - r.d_out * -(-r.d_in // 8) for r in report.layers)
    assert abs((sizes[1] - sizes[0]) - expected) < 8000  # the headers differ


def test_figures_are_written(tiny_folder, tmp_path):
    loaded, report = compressed(tiny_folder)
    save_checkpoint(loaded, tmp_path / "out", {"method": "oats", **report.to_dict()})
    about = json.loads((tmp_path / "out" / "vitoats.json").read_text())
    assert about["format_version"] == 1
    assert about["method"] == "oats"
    assert about["versions"]["timm"] == timm.__version__
    assert len(about["layers"]) == 12
    assert about["preprocessing"]["img_size"] == 32


@pytest.mark.parametrize(
    "damage",
    [
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-100]),
        lambda f: (f / "model.safetensors").write_bytes(b"junk"),
        lambda f: (f / "model.safetensors").unlink(),
        lambda f: (f / "config.json").unlink(),
        lambda f: (f / "config.json").write_text("{}"),
        lambda f: (f / "vitoats.json").write_text("{"),
        lambda f: (f / "vitoats.json").write_text('{"format_version": 99}'),
        lambda f: (f / "vitoats.json").write_text(
            (f / "vitoats.json").read_text().replace("blocks.0.attn.qkv", "blocks.0.attn.proj")
        ),
    ],
    ids=["cut", "junk", "no weights", "no config", "empty config", "bad json", "newer format", "renamed layer"],
)
def test_damage_is_refused(tiny_folder, tmp_path, damage):
    loaded, report = compressed(tiny_folder)
    save_checkpoint(loaded, tmp_path / "out", report.to_dict())
    damage(tmp_path / "out")
    with pytest.raises(InputError, match="out"):
        load_model(str(tmp_path / "out"))


def test_overwriting_swaps_whole_folders(tiny_folder, tmp_path):
    loaded, report = compressed(tiny_folder)
    save_checkpoint(loaded, tmp_path / "out", {"run": 1, **report.to_dict()})
    save_checkpoint(loaded, tmp_path / "out", {"run": 2, **report.to_dict()}, overwrite=True)
    assert json.loads((tmp_path / "out" / "vitoats.json").read_text())["run"] == 2
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_failed_write_leaves_nothing(tiny_folder, tmp_path):
    """A real limit on file size stands in for a full disk; an older folder of the same name survives."""
    loaded, report = compressed(tiny_folder)
    save_checkpoint(loaded, tmp_path / "out", report.to_dict())
    shutil.copytree(tmp_path / "out", tmp_path / "before")
    code = f"""
import resource
from pathlib import Path
from vitoats.loading.checkpoint import save_checkpoint
from vitoats.common.errors import RunError
from vitoats.loading.load import load_model
loaded = load_model({str(tmp_path / "out")!r})
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
for folder in ("out", "new"):
    try:
        save_checkpoint(loaded, Path({str(tmp_path)!r}) / folder, {{}}, overwrite=True)
    except RunError as error:
        assert "`output`" in str(error), error
        print("refused")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent.parent.parent)
    assert done.stdout == "refused\nrefused\n", done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["before", "out"]
    for file in (tmp_path / "before").iterdir():
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()
