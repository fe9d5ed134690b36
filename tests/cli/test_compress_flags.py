"""What the flags of compress do, and how bad ones are refused: one line, at once, nothing written."""

import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

import vitoats
from tests.conftest import write_image
from tests.jobs import same, weights, without
from vitoats.cli.compress import main as compress

import timm  # isort: skip


ROOT = Path(__file__).parent.parent.parent
FILES = ["README.md", "config.json", "model.safetensors", "run.json", "run.log", "vitoats.json"]


# ---- what the flags do


def test_the_seed_decides(succeed, job, tmp_path):
    succeed(compress, *job)
    for name, seed in {"same": 42, "other": 7}.items():
        succeed(compress, *job, "--output", tmp_path / name, "--seed", seed)
    assert same(tmp_path / "out", tmp_path / "same")
    assert not same(tmp_path / "out", tmp_path / "other")


@pytest.mark.parametrize(
    ("flags", "changes"),
    [
        # what changes the result
        (["--rank-ratio", "0.4"], True),
        (["--compression", "0.3"], True),
        (["--iterations", "1"], True),
        (["--nsamples", "3"], True),
        (["--pattern", "layer"], True),
        (["--pattern", "2:4"], True),
        (["--solver", "exact"], True),
        (["--fused-qkv"], True),
        (["--amp"], True),
        (["--crop-mode", "squash"], False),  # these images are square, and timm's default crop differs only by its share
        (["--img-size", "48"], True),
        # what must not
        (["--memory-limit", "100"], False),
        (["--workers", "1"], False),
        (["--quiet"], False),
    ],
)
def test_each_flag_counts(succeed, job, plain, tmp_path, flags, changes):
    succeed(compress, *job, "--output", tmp_path / "other", *flags)
    if "squash" in flags:
        about = json.loads((tmp_path / "other/vitoats.json").read_text())
        assert about["preprocessing"]["crop_mode"] == "squash"
        assert not same(plain, tmp_path / "other")
    else:
        assert same(plain, tmp_path / "other") != changes


def test_batch_size_changes_only_rounding(succeed, job, tmp_path):
    succeed(compress, *job)
    succeed(compress, *job, "--output", tmp_path / "b", "--batch-size", "3")
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(
        vitoats.load(tmp_path / "out")(images), vitoats.load(tmp_path / "b")(images), rtol=1e-2, atol=1e-2
    )


def test_two_of_four(succeed, job, tmp_path):
    result = succeed(compress, *job, "--pattern", "2:4", "--rank-ratio", "0.2")
    assert result["compression"] == pytest.approx(0.375, abs=0.03)
    for layer in json.loads((tmp_path / "out/vitoats.json").read_text())["layers"]:
        assert layer["nonzeros"] == layer["d_out"] * layer["d_in"] // 2


def test_dense_format_is_the_same_model_in_stock_timm(succeed, job, tmp_path):
    succeed(compress, *job)
    result = succeed(compress, *job, "--output", tmp_path / "dense", "--format", "dense")
    stock = timm.create_model(f"local-dir:{tmp_path / 'dense'}", pretrained=True).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(stock(images), vitoats.load(tmp_path / "out")(images), rtol=1e-4, atol=1e-4)
    said = json.loads((tmp_path / "dense/vitoats.json").read_text())  # of what the folder holds, where nothing is skipped
    assert said["counts"]["parameters"] == said["counts"]["nonzeros"] == sum(p.numel() for p in stock.parameters())
    assert result["param_count"] == result["param_count_before"] == round(said["counts"]["parameters"] / 1e6, 3)
    assert said["flops"] == said["flops_before"]
    assert result["gflops"] == result["gflops_before"]


def test_random_weights_of_a_timm_name(succeed, flat_images, tmp_path):
    flags = f"--model vit_tiny_patch16_224 --random-weights --img-size 32 --data-dir {flat_images} --nsamples 16"
    result = succeed(compress, *flags.split(), "--iterations", "1", "--threads", "1", "--output", tmp_path / "out")
    assert result["n_layers"] == 48


def test_a_checkpoint_is_what_gets_compressed(succeed, job, flat_images, tmp_path):
    flags = ["--model", "vit_tiny_patch16_224", "--img-size", "32", "--data-dir", flat_images]
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=5).eval()
    torch.save({"state_dict": model.state_dict()}, tmp_path / "w.pth")
    flags += [
        "--method",
        "oats",
        "--iterations",
        "30",
        "--nsamples",
        "16",
        "--threads",
        "1",
        "--compression",
        "0.01",
        "--output",
        tmp_path / "out",
    ]
    succeed(compress, *flags, "--checkpoint", tmp_path / "w.pth")
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        near, exact = vitoats.load(tmp_path / "out")(images), model(images)
    assert (near - exact).norm() < 0.1 * exact.norm()


# ---- bad usage and bad settings: one line, at once, nothing written


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        # out of range, or no number
        (["--compression", "1"], "--compression"),
        (["--compression", "50"], "--compression"),
        (["--compression", "-0.1"], "--compression"),
        (["--compression", "nan"], "--compression"),
        (["--compression", "half"], "--compression"),
        (["--rank-ratio", "1.2"], "--rank-ratio"),
        (["--rank-ratio", "-1"], "--rank-ratio"),
        (["--rank-ratio", "nan"], "--rank-ratio"),
        (["--iterations", "0"], "--iterations"),
        (["--iterations", "2.5"], "--iterations"),
        (["--nsamples", "0"], "--nsamples"),
        (["--nsamples", "x"], "--nsamples"),
        (["--batch-size", "0"], "--batch-size"),
        (["--workers", "-1"], "--workers"),
        (["--threads", "-1"], "--threads"),
        (["--tolerance", "2"], "--tolerance"),
        (["--tolerance", "nan"], "--tolerance"),
        (["--memory-limit", "-1"], "--memory-limit"),
        (["--memory-limit", "0"], "--memory-limit"),
        (["--memory-limit", "nan"], "--memory-limit"),
        (["--memory-limit", "0.01"], "--batch-size, or raise --memory-limit"),
        (["--seed", "x"], "--seed"),
        (["--seed", "99999999999999999999999"], "--seed"),
        (["--img-size", "0"], "--img-size"),
        (["--img-size", "-32"], "--img-size"),
        # nothing would be left
        (["--compression", "0.9999", "--rank-ratio", "1"], "leaves nothing"),
        # N:M that contradicts itself or the rest
        (["--pattern", "2:4", "--compression", "0.5"], "--rank-ratio 0"),
        (["--pattern", "2:4", "--compression", "0.9"], "leave --compression out"),
        (["--pattern", "2:4", "--rank-ratio", "0.5"], "--rank-ratio below 0.5"),
        (["--pattern", "2:5"], "multiple of 5"),
        (["--pattern", "4:2"], "N:M"),
        (["--pattern", "0:4"], "N:M"),
        (["--pattern", "2:4:8"], "N:M"),
        (["--pattern", ":"], "N:M"),
        (["--pattern", "column"], "row, layer"),
        # no such choice
        (["--solver", "magic"], "fast"),
        (["--format", "npz"], "dense"),
        (["--method", "magic"], "oats"),
        (["--crop-mode", "centre"], "center"),
        (["--device", "banana"], "--device cpu"),
        # no such flag, or half of one
        (["--nonsense"], "--nonsense"),
        (["--compression"], "--compression"),
        (["--config"], "--config"),
        (["more", "words"], "more words"),
    ],
)
def test_bad_settings(refuse, job, tmp_path, flags, said):
    assert said in refuse(compress, *job, *flags)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("missing", ["--model", "--output", "--data-dir"])
def test_what_must_be_given(refuse, job, tmp_path, missing):
    assert missing in refuse(compress, *without(job, missing))
    assert list(tmp_path.iterdir()) == []


BAD_FOLDERS = {
    "missing": (None, "no image folder"),
    "empty": ({}, "no images in"),
    "text": ({"a.txt": b"x"}, "no images in"),
    "broken only": ({"a.png": b"x", "b.jpg": b""}, "only 0 images can be read"),
}


@pytest.mark.parametrize("kind", BAD_FOLDERS)
def test_bad_image_folders(refuse, job, tmp_path, kind):
    files, said = BAD_FOLDERS[kind]
    data = tmp_path / "data"
    if files is not None:
        data.mkdir()
        for name, content in files.items():
            (data / name).write_bytes(content)
    line = refuse(compress, *job, "--data-dir", data, warnings=True)
    assert said in line
    assert not (tmp_path / "out").exists()
    assert {p.name for p in tmp_path.iterdir()} <= {"data"}


def test_skipped_images_are_named_and_counted(call, job, tmp_path):
    for i in range(16):
        write_image(tmp_path / "data" / f"{i}.png", i)
    (tmp_path / "data" / "text.jpg").write_text("no image")
    (tmp_path / "data" / "cut.png").write_bytes((tmp_path / "data" / "0.png").read_bytes()[:500])
    status, out, err = call(compress, *job, "--data-dir", tmp_path / "data", "--nsamples", "100", "--quiet")
    assert status == 0
    assert json.loads(out)["n_images"] == 16
    assert "text.jpg" in err
    assert "cut.png" in err
    assert "image files skipped: 2" in err
    for name in ("0.png", "1.png", "2.png", "3.png"):
        (tmp_path / "data" / name).write_bytes(b"x")
    status, _, err = call(compress, *job, "--data-dir", tmp_path / "data", "--output", tmp_path / "two", "--quiet")
    assert status == 2
    assert "only 12 images" in err.splitlines()[-1]
    assert not (tmp_path / "two").exists()


BAD_MODELS = {
    "unknown": ("vit_tiny_patch16_225", "vit_tiny_patch16_224"),
    "wrong tag": ("vit_tiny_patch16_224.none", "augreg"),
    "no folder": ("local-dir:/no/such/folder", "/no/such/folder"),
    "not a transformer": ("resnet18", "ViT-like"),
}


@pytest.mark.parametrize("kind", BAD_MODELS)
def test_bad_models(refuse, job, tmp_path, kind):
    name, said = BAD_MODELS[kind]
    flags = ["--random-weights"] if kind == "not a transformer" else []
    assert said in refuse(compress, *job, "--model", name, *flags)
    assert list(tmp_path.iterdir()) == []


def test_what_is_compressed_already_is_not_compressed_again(succeed, refuse, job, tmp_path):
    succeed(compress, *job)
    line = refuse(compress, *job, "--model", tmp_path / "out", "--output", tmp_path / "twice")
    assert "already" in line
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_weights_that_are_not_finite(refuse, job, tiny_folder, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "nan")
    state = weights(tmp_path / "nan")
    state["blocks.0.attn.proj.weight"][3, 3] = float("nan")
    safetensors.torch.save_file(state, str(tmp_path / "nan/model.safetensors"), metadata={"format": "pt"})
    assert "blocks.0.attn.proj.weight" in refuse(compress, *job, "--model", f"local-dir:{tmp_path / 'nan'}")
    assert [p.name for p in tmp_path.iterdir()] == ["nan"]
