"""Variants of a whole model: their files agree with the model, and the memory of a process that runs them."""

import logging
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
)
from vitoats.loading.load import load_model
from vitoats.models.inputs import ImageInputs
from vitoats.runtime import session


@pytest.fixture(scope="module")
def dense(tiny_folder, tmp_path_factory):
    return dense_variants(load_model(f"local-dir:{tiny_folder}"), tmp_path_factory.mktemp("dense"))


def outputs(variant: Variant, images: np.ndarray) -> np.ndarray:
    return session(variant.file, 1).run(None, {"images": images})[0]


def test_variants_compute_what_their_model_does(dense, tiny_folder, plain, tmp_path):
    compressed = load_model(str(plain))
    sparse = compressed_variants(compressed, compressed, "small", tmp_path, folded=True)
    assert [variant.name for variant in [*dense, *sparse]] == [
        *("dense", "int8", "native-int8"),
        *("small", "small-float16", "small-int8", "small-folded"),
    ]
    images = np.random.default_rng(0).standard_normal((2, 3, 32, 32), np.float32)
    for variants, loaded, tolerances in (
        (dense, load_model(f"local-dir:{tiny_folder}"), (1e-4, 0.2, 0.1)),
        (sparse, compressed, (1e-4, 1e-2, 0.1, 1e-4)),
    ):
        with torch.inference_mode():
            expected = loaded.model(torch.from_numpy(images)).numpy()
        for variant, tolerance in zip(variants, tolerances, strict=True):
            assert np.abs(outputs(variant, images) - expected).max() <= tolerance * np.abs(expected).max(), variant.name
    whole, half, int8, folded = (variant.megabytes for variant in sparse)
    assert max(half, int8) < whole < folded  # in so small a model the functions outweigh what int8 saves beside float16


def test_rows_go_by_threads_then_batch_then_variant(dense):
    said: list[str] = []
    rows = compare_variants(dense[1::-1], ImageInputs(32), [1, 2], [1], progress=lambda _done, _total, what: said.append(what))
    assert [(row.batch, row.threads, row.variant) for row in rows] == [(b, 1, v) for b in (1, 2) for v in ("int8", "dense")]
    assert all(row.rss_mb > 20 for row in rows)
    assert said == ["batch 1, 1 threads", "batch 2, 1 threads"]
    for int8, plain in (rows[:2], rows[2:]):  # ratios are of times before these are rounded
        assert (int8.speedup_int8, plain.speedup) == (1, 1)
        assert int8.speedup == pytest.approx(plain.ms / int8.ms, rel=0.05)
        assert plain.speedup_int8 == pytest.approx(int8.ms / plain.ms, rel=0.05)


def test_without_its_packages_openvino_is_no_rival(dense, tiny_folder, monkeypatch, caplog, tmp_path):
    loaded = load_model(f"local-dir:{tiny_folder}")
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    assert openvino_variants(loaded, dense[0], 0, tmp_path) == []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if name == "openvino" else None)
    with caplog.at_level(logging.WARNING):
        found = [(variant.name, variant.file, variant.openvino) for variant in openvino_variants(loaded, dense[0], 0, tmp_path)]
    assert found == [("openvino-f32", dense[0].file, "f32"), ("openvino-bf16", dense[0].file, "bf16")]
    assert "install vitoats[openvino]" in caplog.text


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_openvino_runs_the_dense_file_and_its_own_int8(dense, tiny_folder, tmp_path):
    pytest.importorskip("openvino")
    pytest.importorskip("nncf")
    loaded = load_model(f"local-dir:{tiny_folder}")
    variants = openvino_variants(loaded, dense[0], 0, tmp_path)
    assert [v.name for v in variants] == ["openvino-f32", "openvino-bf16", "openvino-int8", "openvino-int8-bf16"]
    images = np.random.default_rng(0).standard_normal((1, 3, 32, 32), np.float32)
    expected = outputs(dense[0], images)
    for variant, tolerance in zip(variants, (1e-4, 0.1, 0.2, 0.2), strict=True):
        (found,) = variant.open(1, images)().values()
        assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max(), variant.name
    assert variants[2].megabytes < variants[0].megabytes
    assert variants[2].resident_mb(1, images.shape) > 20


def test_the_process_whose_memory_is_measured_is_a_deployers(dense):
    """It loads neither torch nor anything else that a deployer does without."""
    lean = "{'torch', 'timm', 'onnx', 'rich', 'openvino', 'nncf'}"
    code = f"import sys, vitoats.benchmark.resident; print(sorted({lean} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
    assert dense[0].resident_mb(1, (64, 3, 32, 32)) > dense[0].resident_mb(1, (1, 3, 32, 32)) > 20
