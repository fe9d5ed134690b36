"""Proves the contract of the commands: exit status, one JSON line at the end, one line for an error, nothing half-written."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

import vitoats
from tests.conftest import heed_ctrl_c, write_image
from vitoats.cli import common
from vitoats.cli.benchmark import main as benchmark
from vitoats.cli.compress import main as compress
from vitoats.cli.demo import main as demo
from vitoats.cli.eval_imagenet import main as eval_imagenet
from vitoats.cli.export_onnx import main as export_onnx
from vitoats.cli.main import COMMANDS, dispatch
from vitoats.cli.train_linear_probe import main as train_linear_probe

import timm  # isort: skip

ROOT = Path(__file__).parent.parent
FILES = ["README.md", "config.json", "model.safetensors", "vitoats.json"]


@pytest.fixture
def call(capsys):
    """Runs a command in this process: (exit status, stdout, stderr)."""

    def run(main, *argv):
        capsys.readouterr()
        status = common.run(main, [str(a) for a in argv])
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return status, out, err

    return run


@pytest.fixture
def succeed(call):
    """Runs a command that must succeed; gives its JSON line."""

    def run(main, *argv):
        status, out, err = call(main, *argv)
        assert status == 0, err
        return json.loads(out.splitlines()[-1])

    return run


@pytest.fixture
def refuse(call):
    """Runs a command that must be refused with exit status 2 and one line on stderr; gives that line."""

    def run(main, *argv, warnings=False):
        status, out, err = call(main, *argv, "--quiet")
        assert (status, out) == (2, ""), err
        *before, last = err.splitlines()
        assert last.startswith("error: ")
        assert warnings or before == []
        assert len(last) < 700
        return last

    return run


def small_job(model, images, output):
    """Flags of a small compression, with the quickest method that has settings of all kinds."""
    flags = f"--model local-dir:{model} --data-dir {images} --output {output} --iterations 4 --nsamples 16 --threads 1"
    return [*flags.split(), "--method", "oats"]


@pytest.fixture
def job(tiny_folder, flat_images, tmp_path):
    """A small compression to tmp_path/out."""
    return small_job(tiny_folder, flat_images, tmp_path / "out")


@pytest.fixture(scope="module")
def plain(tiny_folder, flat_images, tmp_path_factory):
    """What the job gives without further flags."""
    folder = tmp_path_factory.mktemp("plain") / "out"
    assert common.run(compress, small_job(tiny_folder, flat_images, folder)) == 0
    return folder


def without(job, *flags):
    """The job without some of its flags and their values."""
    return [word for pair in zip(job[::2], job[1::2], strict=True) if pair[0] not in flags for word in pair]


def weights(folder):
    return safetensors.torch.load_file(str(folder / "model.safetensors"))


def same(a, b):
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---- what success looks like


def test_the_default_method_is_oats_h(succeed, job, tmp_path):
    result = succeed(compress, *without(job, "--method"))
    assert (result["method"], result["rank_ratio"], result["pattern"]) == ("oats-h", 0.25, "layer")
    said = json.loads((tmp_path / "out/vitoats.json").read_text())
    assert said["recipe"]["allocation"] == "sensitivity"
    assert set(said["calibration"]["images"]) == {"own", "synthetic"}


def test_a_preset_sets_what_is_not_given(succeed, refuse, job, tmp_path):
    job = without(job, "--method", "--iterations", "--nsamples")
    succeed(compress, *job, "--preset", "fast")
    said = json.loads((tmp_path / "out/vitoats.json").read_text())
    assert (said["config"]["solver"], said["config"]["iterations"], said["recipe"]["allocation"]) == ("support", 20, "uniform")
    assert (said["calibration"]["nsamples"], said["recipe"]["target"]) == (128, "residual")
    succeed(compress, *job, "--preset", "fast", "--iterations", "3", "--nsamples", "16", "--overwrite")
    said = json.loads((tmp_path / "out/vitoats.json").read_text())
    assert (said["config"]["iterations"], said["calibration"]["nsamples"]) == (3, 16)
    assert "--preset" in refuse(compress, *job, "--preset", "fast", "--method", "wanda", "--overwrite")


@pytest.mark.parametrize("quiet", [True, False])
def test_compress_ends_with_one_json_line(call, job, tmp_path, quiet):
    status, out, err = call(compress, *job, "--results-file", tmp_path / "r.json", *["--quiet"] * quiet)
    assert status == 0
    lines = out.splitlines()
    assert (tmp_path / "r.json").read_text() == lines[-1] + "\n"
    result = json.loads(lines[-1])
    assert result["n_layers"] == 12
    assert result["n_images"] == 16
    assert result["output"] == str(tmp_path / "out")
    assert result["model_mb"] == round((tmp_path / "out/model.safetensors").stat().st_size / 1e6, 3)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == FILES
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "r.json"]  # no scratch left
    if quiet:
        assert (len(lines), err) == (1, "")
    else:
        assert sum("blocks." in line for line in lines) == 12  # the table of layers
        assert "patch_embed.proj" in out  # and what stays dense


def test_compression_in_the_json_line_is_that_of_the_weights(succeed, job, tmp_path):
    result = succeed(compress, *job, "--compression", "0.6", "--rank-ratio", "0.3")
    about = json.loads((tmp_path / "out/vitoats.json").read_text())
    total = kept = 0
    for name, tensor in weights(tmp_path / "out").items():
        if ".S." in name or ".U." in name or ".V." in name:
            kept += tensor.numel() if not name.endswith(".mask") else 0
    for layer in about["layers"]:
        total += layer["d_out"] * layer["d_in"]
    assert result["compression"] == pytest.approx(1 - kept / total, abs=1e-6)
    assert result["compression"] == pytest.approx(0.6, abs=0.03)


def test_all_commands_give_what_the_results_file_holds(call, succeed, job, image_tree, tmp_path):
    succeed(compress, *job)
    runs = [
        (eval_imagenet, "--model", tmp_path / "out", "--data-dir", image_tree),
        (export_onnx, tmp_path / "out", "-o", tmp_path / "m.onnx"),
        (eval_imagenet, "--model", tmp_path / "m.onnx", "--data-dir", image_tree),
        (benchmark, "solver", *job[:2], "--iterations", "2", "--threads", "1"),
    ]
    for i, (main, *argv) in enumerate(runs):
        status, out, err = call(main, *argv, f"--results-file={tmp_path / f'{i}.json'}")
        assert status == 0, err
        assert (tmp_path / f"{i}.json").read_text() == out.splitlines()[-1] + "\n"
        assert json.loads(out.splitlines()[-1])["model"]


def test_a_results_file_that_cannot_be_written(call, job, tmp_path):
    status, out, err = call(compress, *job, "--quiet", "--results-file", tmp_path / "no" / "folder.json")
    assert status == 1
    assert json.loads(out)["n_layers"] == 12  # the result is not lost
    assert len(err.splitlines()) == 1
    assert "--results-file" in err


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
        (["--crop-mode", "squash"], False),  # these images are square, and timm's default crop differs only by its share
        (["--img-size", "48"], True),
        # what must not
        (["--memory-limit", "1e-9"], False),
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
    succeed(compress, *job, "--output", tmp_path / "dense", "--format", "dense")
    stock = timm.create_model(f"local-dir:{tmp_path / 'dense'}", pretrained=True).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(stock(images), vitoats.load(tmp_path / "out")(images), rtol=1e-4, atol=1e-4)


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


# ---- --config


@pytest.fixture
def recipe(tmp_path):
    def write(text):
        (tmp_path / "recipe.yaml").write_text(text)
        return "--config", tmp_path / "recipe.yaml"

    return write


def test_config_sets_and_flags_beat_it(succeed, job, recipe, tmp_path):
    config = recipe("compression: 0.3\nrank-ratio: 0.1\nfused_qkv: true\niterations: 77\nformat: dense\n")
    result = succeed(compress, *job, *config, "--compression", "0.6")
    assert result["compression"] == pytest.approx(0.6, abs=0.03)
    assert (result["rank_ratio"], result["format"]) == (0.1, "dense")
    about = json.loads((tmp_path / "out/vitoats.json").read_text())
    assert about["config"]["iterations"] == 4  # the flag's
    assert about["fused_qkv"] is True


def test_config_can_hold_all_that_is_required(succeed, job, recipe, tmp_path):
    keys = [flag.removeprefix("--") for flag in job[::2]]
    config = recipe("".join(f"{key}: {value}\n" for key, value in zip(keys, job[1::2], strict=True)))
    assert succeed(compress, *config)["n_images"] == 16
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == FILES


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        # YAML 1.1 reads an unquoted 2:4 as the number 124 in base 60
        ("pattern: 2:4", "pattern", "2:4"),
        ('pattern: "2:4"', "pattern", "2:4"),
        ("compression: 3e-1", "compression", 0.3),  # YAML 1.1 takes this for a text
        ("seed: 7", "seed", 7),
        # nothing after the colon is the default
        ("compression:", "compression", 0.5),
        ("nsamples:", "nsamples", 20),  # all there are
        ("seed:", "seed", 42),
        ("solver:", "solver", "fast"),
        # nothing at all
        ("", "compression", 0.5),
        ("# a note only", "compression", 0.5),
    ],
)
def test_what_yaml_makes_of_values(succeed, job, recipe, tmp_path, text, key, value):
    result = succeed(compress, *without(job, "--nsamples"), *recipe(text))
    about = json.loads((tmp_path / "out/vitoats.json").read_text())
    assert ({**about["config"], "nsamples": result["n_images"]})[key] == value


@pytest.mark.parametrize(
    ("text", "said"),
    [
        # unknown keys, with the nearest name
        ("compresion: 0.4", "compression"),
        ("ranks_ratio: 0.4", "rank_ratio"),
        ("zzz: 1", "zzz"),
        ("7: 1", "7"),
        # values are checked as flags are
        ("compression: 2", "--compression"),
        ("compression: half", "half"),
        ("compression: [1, 2]", "compression"),
        ("nsamples: 0", "nsamples"),
        ("nsamples: 2.5", "nsamples"),
        ("nsamples: true", "nsamples"),
        ("iterations: 0", "--iterations"),
        ("solver: magic", "fast"),
        ("fused_qkv: maybe", "true or false"),
        ("fused_qkv: 1", "true or false"),
        ("head_layers: 3", "1, 4"),
        ("pattern: [2, 4]", "pattern"),
        ("method: 5", "oats"),
        ("data_dir: {a: 1}", "data"),
        # no settings
        ("- compression\n- rank", "settings"),
        ("0.5", "settings"),
        ("a: [b", "YAML"),
    ],
)
def test_bad_configs(refuse, job, recipe, tmp_path, text, said):
    config = recipe(text)
    flags = without(job, "--" + text.partition(":")[0].replace("_", "-"))  # which would beat the file
    line = refuse(compress, *flags, *config)
    assert said in line
    assert "did you mean config" not in line
    assert [p.name for p in tmp_path.iterdir()] == ["recipe.yaml"]


@pytest.mark.parametrize("key", ["help", "config"])
def test_keys_that_only_a_command_line_has(refuse, job, recipe, key):
    line = refuse(compress, *job, *recipe(f"{key}: true"))
    assert f"did you mean {key}" not in line


def test_results_file_and_quiet_work_in_a_config(call, job, recipe, tmp_path):
    status, out, err = call(compress, *job, *recipe(f"results_file: {tmp_path / 'r.json'}\nquiet: true\n"))
    assert (status, err) == (0, "")
    assert (tmp_path / "r.json").read_text() == out
    assert json.loads(out)["n_layers"] == 12


@pytest.mark.parametrize("kind", ["missing", "a folder", "binary"])
def test_config_files_that_cannot_be_read(refuse, job, tmp_path, kind):
    path = tmp_path / "recipe.yaml"
    if kind == "a folder":
        path.mkdir()
    elif kind == "binary":
        path.write_bytes(b"\xff\xd8\xff\x00")
    assert str(path) in refuse(compress, *job, "--config", path)
    assert not (tmp_path / "out").exists()


# ---- --output, --overwrite, --resume


def test_an_output_that_exists_is_kept(succeed, refuse, job, tmp_path):
    succeed(compress, *job)
    before = weights(tmp_path / "out")
    assert "--overwrite" in refuse(compress, *job, "--seed", "5")
    assert all(torch.equal(v, before[k]) for k, v in weights(tmp_path / "out").items())
    succeed(compress, *job, "--seed", "5", "--overwrite")
    assert not all(torch.equal(v, before[k]) for k, v in weights(tmp_path / "out").items())
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_overwrite_does_not_touch_what_compress_did_not_write(refuse, job, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    assert "not written by compress" in refuse(compress, *job, "--overwrite")
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"


def test_overwrite_keeps_the_old_folder_when_the_run_fails(succeed, refuse, job, tmp_path):
    succeed(compress, *job)
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    refuse(compress, *job, "--overwrite", "--pattern", "2:5")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_empty_output_folder_is_used(succeed, job, tmp_path):
    (tmp_path / "out").mkdir()
    succeed(compress, *job)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == FILES


def test_all_files_can_be_read_by_those_who_can_read_one(plain):
    modes = {p.name: oct(p.stat().st_mode & 0o777) for p in plain.iterdir()}
    assert len(set(modes.values())) == 1, modes


def test_output_folders_are_made_on_the_way(succeed, job, tmp_path):
    succeed(compress, *job, "--output", tmp_path / "a" / "b" / "out")
    assert sorted(p.name for p in (tmp_path / "a" / "b" / "out").iterdir()) == FILES


@pytest.mark.parametrize("overwrite", [True, False])
def test_an_output_that_is_a_file(refuse, job, tmp_path, overwrite):
    (tmp_path / "out").write_text("mine")
    assert "--output" in refuse(compress, *job, *["--overwrite"] * overwrite)
    assert (tmp_path / "out").read_text() == "mine"


def test_an_output_below_a_file(call, job, tmp_path):
    (tmp_path / "file").write_text("mine")
    status, out, err = call(compress, *job, "--quiet", "--output", tmp_path / "file" / "out")
    assert status in (1, 2)
    assert out == ""
    assert len(err.splitlines()) == 1
    assert "--output" in err


def test_resume_without_an_interrupted_run_just_starts(succeed, job, tmp_path):
    succeed(compress, *job, "--resume")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.fixture(scope="module")
def interrupted(tiny_folder, flat_images, tmp_path_factory):
    """A real process that got a Ctrl-C after its first block: its flags, its folder, and how it ended."""
    root = tmp_path_factory.mktemp("interrupted")
    slow = [*small_job(tiny_folder, flat_images, root / "out"), "--solver", "exact", "--iterations", "200"]
    process = subprocess.Popen(
        [sys.executable, "tools/compress.py", *slow],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_ctrl_c,
    )
    for _ in range(6000):
        if (root / "out.partial" / "block_0.safetensors").is_file():
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    return slow, root, (process.returncode, out, err)


@pytest.fixture
def left(interrupted, tmp_path):
    """A copy of what the interrupted run left, as tmp_path/out.partial, and the flags that go on with it."""
    slow, root, _ = interrupted
    shutil.copytree(root / "out.partial", tmp_path / "out.partial")
    return [*slow, "--output", tmp_path / "out"]


def test_ctrl_c_is_one_line_and_leaves_no_output(interrupted):
    _, root, (status, out, err) = interrupted
    assert (status, out) == (130, ""), err
    assert "Traceback" not in err
    assert "--resume" in err
    assert err.splitlines()[-1] == "error: interrupted"
    assert [p.name for p in root.iterdir()] == ["out.partial"]


def test_a_resumed_run_gives_what_an_uninterrupted_one_gives(left, succeed, tmp_path):
    succeed(compress, *left, "--resume")
    succeed(compress, *left, "--output", tmp_path / "whole")
    assert same(tmp_path / "out", tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "whole"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        # not by accident, and not with another run's blocks
        ([], "--resume"),
        (["--resume", "--rank-ratio", "0.3"], "settings"),
        (["--resume", "--seed", "1"], "settings"),
        (["--resume", "--fused-qkv"], "settings"),
        (["--resume", "--data-dir", "IMAGES"], "images"),
        (["--resume", "--img-size", "48"], "settings"),
    ],
)
def test_blocks_of_another_run_are_not_mixed_in(left, refuse, image_tree, tmp_path, flags, said):
    flags = [str(image_tree) if f == "IMAGES" else f for f in flags]
    assert said in refuse(compress, *left, *flags)
    assert [p.name for p in tmp_path.iterdir()] == ["out.partial"]


@pytest.mark.parametrize("damaged", ["state.json", "block_0.safetensors"])
def test_a_damaged_interrupted_run_is_reported(left, refuse, tmp_path, damaged):
    (tmp_path / "out.partial" / damaged).write_bytes(b"{")
    line = refuse(compress, *left, "--resume", warnings=True)
    assert str(tmp_path / "out.partial") in line
    assert not (tmp_path / "out").exists()


# ---- the other commands


@pytest.mark.parametrize(
    ("main", "argv", "said"),
    [
        (export_onnx, [], "--output"),
        (export_onnx, ["-o", "m.onnx"], "--model"),
        (export_onnx, ["a", "--model", "b", "-o", "m.onnx"], "one model"),
        (export_onnx, ["runs/none", "-o", "m.onnx"], "no model folder runs/none"),
        (export_onnx, ["x", "-o", "m.bin"], ".onnx"),
        (export_onnx, ["x", "-o", "m.onnx", "--inline", "--dense"], "--dense"),
        (export_onnx, ["x", "-o", "m.onnx", "--float16", "--dense"], "--float16"),
        (export_onnx, ["x", "-o", "m.onnx", "--data-dir", "y"], "--verify"),
        (eval_imagenet, [], "--model"),
        (eval_imagenet, ["--model", "vit_tiny_patch16_225", "--data-dir", "x"], "vit_tiny_patch16_224"),
        (eval_imagenet, ["--model", "x", "--num-samples", "0"], "--num-samples"),
        (eval_imagenet, ["--model", "none.onnx", "--data-dir", "x"], "none.onnx"),
        (train_linear_probe, ["--model", "x", "--output", "h.safetensors"], "--data-dir"),
        (train_linear_probe, ["--model", "x", "--data-dir", "y"], "--output"),
        (benchmark, ["solver"], "--model"),
        (benchmark, ["solver", "--model", "vit_tiny_patch16_225"], "vit_tiny_patch16_224"),
        (demo, ["--threads", "x"], "--threads"),
        (dispatch, [], "compress"),
        (dispatch, ["compres"], "compress"),
        (dispatch, ["compress"], "--model"),
        (dispatch, ["eval-imagenet"], "--model"),
    ],
)
def test_bad_usage_of_every_command(refuse, tmp_path, monkeypatch, main, argv, said):
    monkeypatch.chdir(tmp_path)
    assert said in refuse(main, *argv)
    assert list(tmp_path.iterdir()) == []


def test_demo_refuses_a_folder_in_use(refuse, tmp_path):
    (tmp_path / "a.txt").write_text("mine")
    line = refuse(demo, "--output", tmp_path)
    assert str(tmp_path) in line
    assert "--overwrite" not in line  # demo has no such flag


def test_an_onnx_file_that_exists_is_kept(succeed, refuse, job, tmp_path):
    succeed(compress, *job)
    (tmp_path / "m.onnx").write_text("mine")
    assert "--overwrite" in refuse(export_onnx, tmp_path / "out", "-o", tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx").read_text() == "mine"
    result = succeed(export_onnx, tmp_path / "out", "-o", tmp_path / "m.onnx", "--overwrite")
    assert result["sparse_nodes"] == 12
    assert (tmp_path / "m.onnx").stat().st_size > 10_000
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "out"]


@pytest.mark.parametrize("flags", [[], ["--float16"], ["--inline"]])
def test_verify_compares_with_torch(succeed, job, image_tree, tmp_path, flags):
    succeed(compress, *job)
    result = succeed(export_onnx, tmp_path / "out", "-o", tmp_path / "m.onnx", "--verify", "--data-dir", image_tree, *flags)
    assert 0 < result["relative_error"] < (1e-2 if flags == ["--float16"] else 1e-5)
    assert result["native_nodes"] == result["sparse_nodes"]
    assert result["n_images"] > 0
    assert all(image["margin"] <= 2 * result["logit_error"] for image in result["differing"])


def test_an_export_that_cannot_be_written_says_so_before_the_work(call, succeed, job, tmp_path):
    succeed(compress, *job)
    (tmp_path / "file").write_text("mine")
    status, out, err = call(export_onnx, tmp_path / "out", "-o", tmp_path / "file" / "m.onnx", "--quiet")
    assert status in (1, 2)
    assert out == ""
    assert len(err.splitlines()) == 1
    assert "--output" in err


# ---- as real processes


def tool(name, *argv, **env):
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / f"{name}.py"), *map(str, argv)],
        cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True, timeout=45,
    )  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_every_tool_starts_and_helps(name):
    done = tool(name, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert name in done.stdout
    refused = tool(name, "--nonsense")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith("error: ")
    assert len(refused.stderr.splitlines()) == 1


def test_a_whole_run_as_users_start_it(job, tmp_path):
    done = tool("compress", *job, "--quiet", "--results-file", tmp_path / "r.json")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (tmp_path / "r.json").read_text()


@pytest.mark.parametrize("reach", ["nothing answers", "a proxy that is not there"])
def test_weights_that_cannot_be_fetched_fail_fast_in_one_line(job, tmp_path, reach):
    dead = "http://127.0.0.1:9"
    env = {
        "nothing answers": {"HF_ENDPOINT": dead},
        "a proxy that is not there": {"https_proxy": dead, "http_proxy": dead, "all_proxy": dead},
    }[reach]
    done = tool("compress", *job, "--model", "dinov2_vits14", "--quiet", HF_HOME=str(tmp_path / "hf"), **env)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    for part in ("dinov2_vits14_pretrain.pth", "--checkpoint", "local-dir:"):
        assert part in done.stderr
    assert not (tmp_path / "out").exists()


def test_an_old_pickle_is_refused_in_one_line(job, tmp_path):
    (tmp_path / "w.pth").write_bytes(b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x0dtouch pwned; x\x85R.")
    done = tool("compress", *job, "--model", "dinov2_vits14", "--checkpoint", tmp_path / "w.pth", "--quiet")
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert not (ROOT / "pwned").exists()


def test_a_pipe_that_closes_early_is_no_traceback(job):
    read, write = os.pipe()
    os.close(read)
    process = subprocess.Popen(
        [sys.executable, "tools/compress.py", *job, "--quiet"], cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True
    )
    os.close(write)
    err = process.communicate(timeout=60)[1]
    assert "Traceback" not in err
    assert "Exception ignored" not in err
