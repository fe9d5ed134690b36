"""--config: YAML recipes, flags that beat them, and files that are wrong."""

import json
from pathlib import Path

import pytest

from tests.jobs import without
from vitoats.cli.compress import main as compress

ROOT = Path(__file__).parent.parent.parent
FILES = ["README.md", "config.json", "model.safetensors", "run.json", "run.log", "vitoats.json"]


# ---- --config


@pytest.fixture
def recipe(tmp_path):
    def write(text):
        (tmp_path / "recipe.yaml").write_text(text)
        return "--config", tmp_path / "recipe.yaml"

    return write


def test_config_sets_and_flags_beat_it(succeed, job, recipe, tmp_path):
    config = recipe("compression: 0.3\nrank-ratio: 0.1\nfused_qkv: true\namp: true\niterations: 77\nformat: dense\n")
    result = succeed(compress, *job, *config, "--compression", "0.6")
    assert result["compression"] == pytest.approx(0.6, abs=0.03)
    assert (result["rank_ratio"], result["format"]) == (0.1, "dense")
    about = json.loads((tmp_path / "out/vitoats.json").read_text())
    assert about["config"]["iterations"] == 4  # the flag's
    assert about["fused_qkv"] is about["recipe"]["amp"] is True


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
        ("head_layers: 0", "whole number"),
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


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("no_refit_bias: true", "refit_bias"),  # which would have switched it on
        ("workers: 0\nnum-workers: 1", "the same setting"),
        ("seed: 1\nseed: 2", "twice"),
        ("a: &a [x]\nb: [*a, *a]", "anchors and aliases"),
        ("seed: " + "[" * 10_000, "nested too deep"),
    ],
)
def test_what_would_be_taken_wrongly_is_refused(refuse, job, recipe, text, said):
    assert said in refuse(compress, *job, *recipe(text))


def test_a_recipe_that_could_be_read_once_only_is_refused(refuse, job):
    assert "read twice" in refuse(compress, *job, "--config", "/dev/stdin")


def test_an_abbreviated_config_is_not_passed_over_in_silence(refuse, job, recipe):
    _, path = recipe("compression: 0.3")
    assert "in full" in refuse(compress, *job, "--conf", path)
    assert "ambiguous" in refuse(compress, *job, "--co", "0.5")
