"""What would fail at the end is refused before the work starts: nothing is loaded, let alone computed."""

import subprocess
import sys

import pytest

from vitoats.cli.benchmark import main as benchmark
from vitoats.cli.compare import main as compare
from vitoats.cli.compare_lm import main as compare_lm
from vitoats.cli.compress import main as compress
from vitoats.cli.demo import main as demo
from vitoats.cli.eval_imagenet import main as eval_imagenet
from vitoats.cli.eval_perplexity import main as eval_perplexity
from vitoats.cli.export_onnx import main as export_onnx
from vitoats.cli.front import main as front
from vitoats.cli.train_linear_probe import main as train_linear_probe

EMBEDDED = ["--model", "dinov2s_derived"]


@pytest.fixture
def _no_work(monkeypatch):
    """Loading a model fails the test."""

    def load(*_args, **_kwargs):
        raise AssertionError("the work has started")

    for place in ("vitoats.loading.source.load_model", "vitoats.loading.language_models._from_folder"):
        monkeypatch.setattr(place, load)


@pytest.mark.usefixtures("_no_work")
@pytest.mark.parametrize(
    ("command", "flags"),
    [
        (compress, [*EMBEDDED, "--output"]),
        (compare, [*EMBEDDED, "--methods", "wanda", "--output"]),
        (front, ["--output"]),
        (compare_lm, ["--model", "smollm2", "--data-dir", "sample", "--tests", "sample", "--output"]),
        (export_onnx, [*EMBEDDED, "--output"]),
        (train_linear_probe, [*EMBEDDED, "--data-dir", "sample", "--output"]),
        (demo, ["--output"]),
        (eval_imagenet, [*EMBEDDED, "--results-file"]),
        (benchmark, ["model", "--results-file"]),
    ],
)
def test_an_output_below_a_file_is_refused_first(command, flags, tmp_path, refuse):
    (tmp_path / "file").write_text("")
    name = {export_onnx: "x.onnx", train_linear_probe: "x.safetensors"}.get(command, "x")
    assert f"{tmp_path / 'file' / name} cannot be written" in refuse(command, *flags, tmp_path / "file" / name)


@pytest.mark.usefixtures("_no_work")
def test_a_folder_that_takes_no_files_is_refused_first(refuse):
    """For root, permissions forbid nothing."""
    assert "cannot be written, /proc is no folder" in refuse(eval_imagenet, *EMBEDDED, "--results-file", "/proc/results.json")


@pytest.mark.usefixtures("_no_work")
@pytest.mark.parametrize(
    ("command", "flags", "said"),
    [
        (train_linear_probe, [*EMBEDDED, "--data-dir", "sample", "-o", "h.pth"], "does not end in .safetensors"),
        (
            train_linear_probe,
            [*EMBEDDED, "--data-dir", "sample", "-o", "h.safetensors", "--solver", "lbfgs", "--learning-rates", "1"],
            "--learning-rates",
        ),
        (export_onnx, [*EMBEDDED, "-o", "x.onnx", "--num-samples", "3"], "--verify"),
        (eval_imagenet, [*EMBEDDED, "--results-format", "csv"], "--results-file"),
        (eval_perplexity, ["--model", "smollm2", "--data-dir", "sample", "--against", "local-dir:/nowhere"], "--against"),
    ],
)
def test_flags_that_do_not_go_together(command, flags, said, refuse):
    assert said in refuse(command, *flags)


def test_images_to_verify_on_are_opened_before_the_export(tiny_folder, tmp_path, refuse):
    file = tmp_path / "x.onnx"
    flags = ["--model", f"local-dir:{tiny_folder}", "-o", file, "--verify", "--data-dir", tmp_path / "nowhere"]
    assert "no image folder" in refuse(export_onnx, *flags)
    assert not file.exists()


def test_the_flag_of_the_missing_folder_is_named(tiny_folder, flat_images, image_tree, tmp_path, refuse):
    common = ["--model", f"local-dir:{tiny_folder}", "--output", tmp_path / "out", "--quiet"]
    mixed = ["--data-dir", flat_images, "--calibration-mix", "general", "--general-images", tmp_path / "nowhere"]
    assert "give --general-images a folder" in refuse(compress, *common, *mixed)
    compared = ["--data-dir", image_tree, "--methods", "wanda", "--ood-dir", tmp_path / "nowhere"]
    assert "give --ood-dir a folder" in refuse(compare, *common, *compared, warnings=True)


def test_an_existing_file_of_weights_is_not_replaced_unasked(tiny_folder, tmp_path, refuse):
    (tmp_path / "x.onnx.data").write_text("mine")
    line = refuse(export_onnx, "--model", f"local-dir:{tiny_folder}", "-o", tmp_path / "x.onnx")
    assert "x.onnx.data exists: add --overwrite" in line


@pytest.mark.parametrize(
    ("package", "command", "extra"),
    [
        ("matplotlib", "compare --model dinov2s_derived --methods wanda -o out", "compress"),
        ("transformers", "eval_perplexity --model smollm2 --data-dir sample", "lm"),
    ],
)
def test_missing_packages_are_named_with_what_installs_them(package, command, extra, tmp_path):
    code = f"import sys; sys.modules[{package!r}] = None; from vitoats.cli.main import main; sys.exit(main())"
    argv = [sys.executable, "-c", code, *command.split()]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert package in last
    assert f"pip install 'vitoats[{extra}]'" in last


def test_a_variant_of_openvino_without_openvino(refuse, monkeypatch):
    monkeypatch.setattr("vitoats.benchmark.openvino_files.installed", lambda name: False)
    assert "vitoats[openvino]" in refuse(benchmark, "model", "--variant", "openvino-f32")
