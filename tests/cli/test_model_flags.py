"""Proves that preprocessing and arguments of the model on the command line reach the folder and the ONNX file."""

import json

import pytest

from vitoats.cli.compress import main as compress
from vitoats.cli.eval_imagenet import main as evaluate
from vitoats.cli.export_onnx import main as export
from vitoats.runtime import metadata, session

FLAGS = ["--mean", "0.1", "--std", "0.2", "0.3", "0.4", "--interpolation", "nearest", "--crop-pct", "0.8"]
SAID = {"mean": [0.1] * 3, "std": [0.2, 0.3, 0.4], "interpolation": "nearest", "crop_pct": 0.8}


def test_the_folder_and_the_file_keep_preprocessing_and_arguments(job, tmp_path, succeed, image_tree):
    succeed(compress, *job, *FLAGS, "--model-kwargs", "global_pool=avg", "fc_norm=False")
    about = json.loads((tmp_path / "out" / "vitoats.json").read_text())
    assert about["preprocessing"].items() >= SAID.items()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_args"]["global_pool"] == "avg"

    file = tmp_path / "m.onnx"
    result = succeed(export, tmp_path / "out", "-o", file, "--verify")
    assert result["relative_error"] < 1e-4
    assert metadata(session(file))["preprocessing"].items() >= SAID.items()

    found = [succeed(evaluate, "--model", m, "--data-dir", image_tree, "-j", 0) for m in (tmp_path / "out", file)]
    assert [(row["crop_pct"], row["interpolation"]) for row in found] == [(0.8, "nearest")] * 2
    assert found[0]["n_correct1"] == found[1]["n_correct1"]


def test_flags_of_several_values_stand_in_a_config_file(job, tmp_path, succeed):
    (tmp_path / "c.yaml").write_text("mean: 0.1\nstd: 0.2 0.3 0.4\nmodel_kwargs: global_pool=avg fc_norm=False\n")
    succeed(compress, *job, "--config", tmp_path / "c.yaml")
    about = json.loads((tmp_path / "out" / "vitoats.json").read_text())
    assert (about["preprocessing"]["mean"], about["preprocessing"]["std"]) == ([0.1] * 3, [0.2, 0.3, 0.4])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--mean", 123.7, 116.3, 103.5], "a mean of 123.7 is for pixels in 0..255: divide --mean"),
        (["--mean", "nan"], "its mean is (nan, nan, nan): give another --mean"),
        (["--mean", 1, 2], "--mean takes one number, or one for each of 3 channels, not 2"),
        (["--model-kwargs", "depth"], "'depth' is not of the form NAME=VALUE"),
        (["--model-kwargs", "nonsense=1"], "give --model-kwargs others"),
        (["--head-name", "x"], "give --head"),
    ],
)
def test_flags_that_cannot_be_are_refused(job, refuse, flags, said):
    assert said in refuse(compress, *job, *flags)
