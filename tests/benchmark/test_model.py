"""Variants of a whole model: their files agree with the model, and the memory of a process that runs them."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from vitoats.benchmark.model import (
    Variant,
    compare_variants,
    compressed_variants,
    dense_variants,
    openvino_variants,
    resident_mb,
)
from vitoats.loading.load import load_model
from vitoats.runtime import session


@pytest.fixture(scope="module")
def dense(tiny_folder, tmp_path_factory):
    return dense_variants(load_model(f"local-dir:{tiny_folder}"), tmp_path_factory.mktemp("dense"))


def outputs(variant: Variant, images: np.ndarray) -> np.ndarray:
    return session(variant.file, 1).run(None, {"images": images})[0]


def test_variants_compute_what_their_model_does(dense, tiny_folder, plain, tmp_path):
    compressed = load_model(str(plain))
    sparse = compressed_variants(compressed, "small", tmp_path, folded=True)
    assert [variant.name for variant in [*dense, *sparse]] == ["dense", "int8", "small", "small-float16", "small-folded"]
    images = np.random.default_rng(0).standard_normal((2, 3, 32, 32), np.float32)
    for variants, loaded, tolerances in (
        (dense, load_model(f"local-dir:{tiny_folder}"), (1e-4, 0.2)),
        (sparse, compressed, (1e-4, 1e-2, 1e-4)),
    ):
        with torch.inference_mode():
            expected = loaded.model(torch.from_numpy(images)).numpy()
        for variant, tolerance in zip(variants, tolerances, strict=True):
            assert np.abs(outputs(variant, images) - expected).max() <= tolerance * np.abs(expected).max(), variant.name
    half, whole, folded = (variant.file.stat().st_size for variant in (sparse[1], sparse[0], sparse[2]))
    assert half < whole < folded


def test_rows_go_by_threads_then_batch_then_variant(dense):
    said: list[str] = []
    rows = compare_variants([dense[0], dense[0]], 32, [1, 2], [1], progress=lambda _done, _total, what: said.append(what))
    assert [(row.batch, row.threads, row.variant) for row in rows] == [(b, 1, "dense") for b in (1, 1, 2, 2)]
    assert all(row.rss_mb > 20 for row in rows)
    assert said == ["batch 1, 1 threads", "batch 2, 1 threads"]


def test_openvino_runs_the_dense_files_where_it_is_installed(dense, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    assert openvino_variants(*dense) == []
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: object())
    found = [(variant.name, variant.file, variant.openvino) for variant in openvino_variants(*dense)]
    assert found == [
        ("openvino-f32", dense[0].file, "f32"),
        ("openvino-bf16", dense[0].file, "bf16"),
        ("openvino-int8", dense[1].file, "f32"),
    ]


def test_the_process_whose_memory_is_measured_is_a_deployers(dense):
    """It loads neither torch nor anything else that a deployer does without."""
    code = "import sys, vitoats.benchmark.resident; print(sorted({'torch', 'timm', 'onnx', 'rich'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
    assert resident_mb(dense[0].file, 1, (64, 3, 32, 32)) > resident_mb(dense[0].file, 1, (1, 3, 32, 32)) > 20
