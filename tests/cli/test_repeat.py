"""Runs leave a manifest and a log beside their results, from which they can be repeated; strangers' manifests do no harm."""

import json
import shutil
from pathlib import Path

import pytest

from tests.conftest import write_image
from tests.jobs import small_job
from vitoats.cli import common
from vitoats.cli.compare import main as compare
from vitoats.cli.compare_lm import main as compare_lm
from vitoats.cli.compress import main as compress
from vitoats.cli.eval_imagenet import main as eval_imagenet
from vitoats.cli.eval_perplexity import main as eval_perplexity
from vitoats.cli.export_onnx import main as export_onnx
from vitoats.cli.repeat import REPEATED, main
from vitoats.cli.sample_lm import main as sample_lm
from vitoats.cli.train_linear_probe import main as train_linear_probe
from vitoats.common.manifest import log_path, manifest_path, read_manifest
from vitoats.comparison.repeated import OF_A_RUN

METHOD = """
from pathlib import Path
from vitoats.methods import magnitude, registry
Path({marker!r}).write_text("ran")
registry.register("mine", magnitude.MagnitudeConfig, needs="none")(magnitude.magnitude)
"""


def done(command, *argv) -> None:
    assert common.run(command, [*map(str, argv), "--quiet"]) == 0
    common.log.handlers.clear()


@pytest.fixture(scope="module")
def root(tmp_path_factory, shallow_folder):
    """A compressed folder, its ONNX file, a head, an accuracy, and a comparison; and the images they are made of."""
    root = tmp_path_factory.mktemp("runs")
    for i in range(40):
        write_image(root / "images" / f"class{i % 4}" / f"{i:02}.png", i)
    job = small_job(shallow_folder, root / "images", root / "out")
    done(compress, *job)
    done(export_onnx, root / "out", "--output", root / "model.onnx")
    named = ("--model", f"local-dir:{shallow_folder}", "--data-dir", root / "images", "--threads", 1)
    done(train_linear_probe, *named, "--solver", "lbfgs", "--output", root / "head.safetensors", "--cache", root / "cache")
    done(eval_imagenet, *named, "--workers", 0, "--results-file", root / "top1.json")
    done(compare, *named, "--methods", "wanda", "--nsamples", 16, "--output", root / "table", "--keep-models")
    return root


@pytest.fixture
def changed(root, tmp_path):
    """Changes the manifest of a copy of the compressed folder, whose path it returns."""

    def change(**values) -> Path:
        folder = tmp_path / "out"
        shutil.copytree(root / "out", folder)
        manifest = json.loads((folder / "run.json").read_text())
        (folder / "run.json").write_text(json.dumps(manifest | values))
        return folder

    return change


def argv_of(folder: Path) -> list[str]:
    return read_manifest(folder).argv


@pytest.mark.parametrize("name", ["out", "model.onnx", "head.safetensors", "top1.json", "table"])
def test_a_repeated_run_gives_the_same(root, tmp_path, succeed, name):
    cache = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    found = succeed(main, root / name, "--output", tmp_path / name)
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == cache  # nothing is written but the output
    assert found["relative_difference"] == 0
    again = succeed(main, tmp_path / name, "--output", tmp_path / f"again-{name}")
    if name == "table":  # whose rows hold times, which may be equal by chance
        for differences in (found["differences"], again["differences"]):
            assert set(differences.values()) <= {"the same figures, but for times and paths"}
    else:
        assert found["equal"], found
        assert again["equal"], again


def test_times_do_not_count():
    keys = ("seconds", "ms", "latency_ms", "latency_ms_dense_batch8", "speedup", "speedup_batch8", "speedup_int8")
    assert all(OF_A_RUN.fullmatch(key) for key in (*keys, "images_per_second"))
    assert not any(OF_A_RUN.fullmatch(key) for key in ("top1", "params", "onnx_mb", "compression"))


def test_the_manifest_tells_of_all_that_went_in(root, shallow_folder):
    manifest = read_manifest(root / "out")
    assert manifest.command == "compress"
    assert manifest.settings["iterations"] == 4
    assert manifest.settings["seed"] == 42  # a default
    assert {f"{shallow_folder}/model.safetensors", "calibration data (own)"} <= manifest.inputs.keys()
    assert set(manifest.outputs) == {"README.md", "config.json", "model.safetensors", "vitoats.json"}
    assert {"vitoats", "python", "torch", "timm"} <= manifest.versions.keys()
    assert manifest.result["n_images"] == 16
    assert "feature error" in log_path(root / "out").read_text()  # though the run was quiet


def test_without_an_output_it_is_written_beside_the_first(root, succeed):
    found = succeed(main, root / "model.onnx")
    assert found["output"] == str(root / "model-repeated.onnx")
    assert manifest_path(root / "model-repeated.onnx").is_file()


def test_changed_inputs_are_named_in_one_line(root, refuse, tmp_path):
    images = tmp_path / "images"
    shutil.copytree(root / "images", images)
    model = tmp_path / "model"
    shutil.copytree(root / "out", model)
    done(export_onnx, model, "--output", tmp_path / "model.onnx")
    done(eval_imagenet, "--model", model, "--data-dir", images, "--workers", 0, "--results-file", tmp_path / "top1.json")
    write_image(next(images.rglob("*.png")), 1000)
    line = refuse(main, tmp_path / "top1.json", "--output", tmp_path / "again.json")
    assert "not the same as in the first run: test images;" in line
    for name in ("README.md", "config.json"):
        with (model / name).open("a") as file:
            file.write(" ")
    line = refuse(main, tmp_path / "model.onnx", "--output", tmp_path / "again.onnx")
    assert f"{model / 'README.md'}, {model / 'config.json'};" in line
    assert not list(tmp_path.glob("again*"))


def test_other_circumstances_are_warnings(root, changed, call, tmp_path):
    first = read_manifest(root / "out")
    versions = first.versions | {"torch": "1.0"}
    folder = changed(versions=versions, machine=first.machine | {"processor": "Z80"}, environment={"OMP_NUM_THREADS": "77"})
    status, _, err = call(main, folder, "--output", tmp_path / "again")
    assert status == 0
    assert "torch: 1.0 in the first run" in err
    assert "processor: Z80 in the first run" in err
    assert "OMP_NUM_THREADS: 77 in the first run" in err


def test_other_weights_are_measured(root, changed, succeed, tmp_path):
    """The manifest says another number of iterations than the folder was made with."""
    argv = [*argv_of(root / "out"), "--iterations", "3"]
    found = succeed(main, changed(argv=argv), "--output", tmp_path / "again")
    assert not found["equal"]
    assert 1e-4 < found["relative_difference"] < 1
    assert "relative difference of the weights" in found["differences"]["model.safetensors"]
    assert "config.iterations 4 -> 3" in found["differences"]["vitoats.json"]


# ---- manifests of strangers


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"command": "push"}, "not repeated"),
        ({"command": "../evil"}, "not repeated"),
        ({"command": 3}, "damaged"),
        ({"manifest_version": 2}, "version 2"),
        ({"argv": "--model x"}, "damaged"),
        ({"argv": ["--model", 3]}, "damaged"),
        ({"argv": ["--help"]}, "request for help"),
        ({"argv": ["--evil"]}, "flags are refused"),
        ({"inputs": {"x": "y"}}, "damaged"),
        ({"inputs": []}, "damaged"),
        ({"outputs": {"../../x": "0"}}, "outside"),
        ({"outputs": {"/etc/passwd": "0"}}, "outside"),
        ({"versions": {"torch": 2}}, "damaged"),
        ({"versions": None}, "damaged"),
    ],
)
def test_damaged_manifests_are_refused(changed, refuse, tmp_path, values, said):
    assert said in refuse(main, changed(**values), "--output", tmp_path / "again")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", '"run"', '{"manifest_version": 1}', '{"a": 1, "a": 2}'])
def test_what_is_no_manifest_is_refused(changed, refuse, tmp_path, text):
    folder = changed()
    (folder / "run.json").write_text(text)
    assert "damaged" in refuse(main, folder, "--output", tmp_path / "again")


def test_a_result_without_a_manifest(refuse, tmp_path):
    assert "has no manifest" in refuse(main, tmp_path)


def test_code_runs_only_with_the_flag_that_allows_it(root, changed, refuse, succeed, tmp_path):
    marker, method = tmp_path / "marker", tmp_path / "mine.py"
    method.write_text(METHOD.format(marker=str(marker)))
    argv = [word for word in argv_of(root / "out") if word not in ("--iterations", "4")]
    folder = changed(argv=[*argv, "--method", f"{method}:mine"])
    assert "--allow-code" in refuse(main, folder, "--output", tmp_path / "again")
    assert not marker.exists()
    succeed(main, folder, "--output", tmp_path / "again", "--allow-code")
    assert marker.exists()
    first = read_manifest(root / "top1.json")
    found = json.loads(manifest_path(root / "top1.json").read_text())
    manifest_path(tmp_path / "top1.json").write_text(json.dumps(found | {"argv": [*first.argv, "--dataset", "wds/x"]}))
    assert "--allow-code" in refuse(main, tmp_path / "top1.json")


def test_nothing_is_written_but_the_output(root, changed, succeed, tmp_path):
    """Whatever else the flags name."""
    elsewhere = tmp_path / "elsewhere"
    argv = [*argv_of(root / "out"), "--output", elsewhere / "a", "--results-file", elsewhere / "b", "--overwrite", "--resume"]
    folder = changed(argv=[*map(str, argv), "--report", str(elsewhere / "c.html")], outputs={})
    succeed(main, folder, "--output", tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").is_file()
    assert not elsewhere.exists()


def test_an_output_that_exists_is_kept(root, refuse, tmp_path):
    for name in ("out", "table", "model.onnx", "top1.json"):
        (tmp_path / name).write_text("mine")
        assert "exists" in refuse(main, root / name, "--output", tmp_path / name)
        assert (tmp_path / name).read_text() == "mine"


def test_a_run_whose_record_cannot_be_written_ends_well(root, shallow_folder, call, tmp_path):
    (tmp_path / "model.onnx.run.json").mkdir()
    status, out, err = call(export_onnx, root / "out", "--output", tmp_path / "model.onnx")
    assert status == 0
    assert json.loads(out.splitlines()[-1])["sparse_nodes"] == 4
    assert "the result is whole" in err


def test_all_that_can_be_repeated_writes_to_an_output_or_a_results_file():
    import importlib

    for name in REPEATED:
        parser = importlib.import_module(f"vitoats.cli.{name}").make_parser()
        names = {action.dest for action in parser._actions}
        assert names & {"output", "results_file"}
        paths = {action.dest for action in parser._actions if action.type is Path}
        read = {"checkpoint", "head", "config", "cost_table", "ood_dir", "class_map", "real_labels", "valid_labels"}
        assert paths - read <= {"output", "results_file", "report", "cache"}  # that repeat sends elsewhere


# ---- language models


def test_runs_of_language_models_are_repeated(succeed, refuse, tmp_path):
    from tests.language_models import PROSE, save_folder

    model, text = save_folder(tmp_path / "model"), tmp_path / "a.txt"
    text.write_text(PROSE)
    flags = ("--model", f"local-dir:{model}", "--data-dir", text, "--seq-len", 16, "--nsamples", 16, "--method", "wanda")
    done(compress, *flags, "--threads", 1, "--output", tmp_path / "out")
    assert succeed(main, tmp_path / "out")["equal"]
    done(eval_perplexity, "--model", tmp_path / "out", "--data-dir", text, "--results-file", tmp_path / "perplexity.json")
    assert succeed(main, tmp_path / "perplexity.json")["equal"]
    done(sample_lm, *flags[:2], "-n", 3, "--seq-len", 12, "--threads", 1, "--output", tmp_path / "sampled.jsonl")
    assert succeed(main, tmp_path / "sampled.jsonl")["equal"]
    few = ("--tests", text, "--test-tokens", 100, "--methods", "wanda", "4-bit", "--compressions", 50)
    done(compare_lm, *flags[:-2], *few, "--threads", 1, "--output", tmp_path / "table.jsonl")
    found = succeed(main, tmp_path / "table.jsonl")
    assert set(found["differences"].values()) <= {"the same figures, but for times and paths"}
    assert len((tmp_path / "table-repeated.jsonl").read_text().splitlines()) == 3
    text.write_text(PROSE + "More.")
    assert str(text) in refuse(main, tmp_path / "out", "--output", tmp_path / "other")
