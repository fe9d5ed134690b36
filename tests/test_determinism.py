"""The same settings, seed and threads write the same bytes: with other hash seeds, and across an interruption."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from timm.models import save_for_hf

from tests.conftest import make_tiny
from vitoats.common.file_digests import file_sha256
from vitoats.common.manifest import is_record

SMALL = "--nsamples 12 --threads 1 --quiet"
PLAIN = "--model local-dir:{model} --data-dir {images} " + SMALL
METHODS = (
    *("magnitude", "wanda", "sparsegpt", "mrp", "svd", "numerical", "dass --method-options plain=true"),
    *("oats --iterations 4", "oats --solver exact --iterations 4", "alps --iterations 4", "dsnot --iterations 4"),
)
# OATS-H: measured budgets, the residual target, synthetic images
DEFAULT = [f"compress {PLAIN} -o recipe --iterations 4"]
EVERY = [
    *(f"compress {PLAIN} -o {i} --method {method}" for i, method in enumerate(METHODS)),
    f"compress {PLAIN} -o int8 --weights int8 --iterations 4 --allocation uniform",
    "export_onnx 2 -o float32.onnx --quiet",
    "export_onnx 2 -o float16.onnx --float16 --quiet",
    "export_onnx 2 -o int8.onnx --int8 --quiet",
    "export_onnx int8 -o features.onnx --features all --quiet",
    "train_linear_probe --model int8 --data-dir {images} --threads 1 --epochs 2 --workers 0 -o probe.safetensors --quiet",
]
LANGUAGE = [
    "sample_lm --model local-dir:{model} -n 6 --seq-len 40 -o sampled.jsonl --quiet",
    f"compress --model local-dir:{{model}} --data-dir sampled.jsonl -o recipe --iterations 4 --seq-len 12 {SMALL}",
    f"compress --model local-dir:{{model}} --data-dir sampled.jsonl -o heads --method numerical --seq-len 12 {SMALL}",
]


def digests(folder: Path) -> dict[str, str]:
    """Of each file that the commands have written, by its path; manifests and logs hold times."""
    return {str(p.relative_to(folder)): file_sha256(p) for p in folder.rglob("*") if p.is_file() and not is_record(p.name)}


def written(folder: Path, hash_seed: int, commands: list[str], *flags: str) -> dict[str, str]:
    """What the commands write in a new folder, with a cache of its own."""
    folder.mkdir()
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).parent.parent),
        "PYTHONHASHSEED": str(hash_seed),
        "XDG_CACHE_HOME": str(folder.with_name(f"cache-{folder.name}")),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "tests.commands", *commands, *flags]
    subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)
    return digests(folder)


@pytest.fixture(scope="module")
def two_blocks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "model"
    save_for_hf(make_tiny(depth=2), str(folder), safe_serialization=True)
    return folder


def check(tmp_path, commands, n_files, **names):
    commands = [command.format(**names) for command in commands]
    first = written(tmp_path / "first", 1, commands)
    assert len(first) >= n_files
    assert written(tmp_path / "second", 2, commands, "--interrupt") == first


def test_the_default_recipe(two_blocks, image_tree, tmp_path):
    check(tmp_path, DEFAULT, 4, model=two_blocks, images=image_tree)


@pytest.mark.slow
def test_every_method_and_kind_of_file(two_blocks, image_tree, tmp_path):
    check(tmp_path, EVERY, 4 * (len(METHODS) + 1) + 5, model=two_blocks, images=image_tree)


@pytest.mark.slow
def test_a_language_model_and_its_samples(tmp_path):
    language_models = pytest.importorskip("tests.language_models")
    folder = language_models.save_folder(tmp_path / "model")
    check(tmp_path, LANGUAGE, 7, model=folder)
