"""The benchmark commands: their JSON lines, their flags, and that what they time is right. Never how long it took."""

import json
import math

import numpy as np
import pytest
import torch

from vitoats.cli import benchmark_op
from vitoats.cli.benchmark import main
from vitoats.cli.benchmark_op import check, dense_model, int8_model, open_model, pruned, sparse_model
from vitoats.cli.common import run
from vitoats.cli.export_onnx import main as export_onnx
from vitoats.data.images import calibration_batches, open_images
from vitoats.loading.load import load_model

OP_FIELDS = {"n", "k", "tokens", "zeros", "threads", "dense_ms", "int8_ms", "sparse_ms", "speedup", "nnz_gflops"}
MODEL_FIELDS = {"model", "batch", "threads", "variant", "ms", "speedup", "file_mb", "rss_mb"}


@pytest.fixture
def small_cache(monkeypatch):
    """A cache so small that few copies of the weights exceed it."""
    monkeypatch.setattr(benchmark_op, "last_level_cache", lambda: 10_000)


def test_op_measures_what_was_asked(small_cache, tmp_path, capsys):
    flags = "op --shape 24x40 --shape 16x8 --tokens 3 --tokens 2x9 --zeros 50 --zeros 75 --threads 1 --pattern row"
    assert run(main, [*flags.split(), "--results-file", str(tmp_path / "op.json")]) == 0
    printed = capsys.readouterr().out.splitlines()
    result = json.loads(printed[-1])
    assert json.loads((tmp_path / "op.json").read_text()) == result
    assert result["fma_peak_gflops"] > 0
    rows = result["rows"]
    found = {(r["n"], r["k"], r["tokens"], r["zeros"], r["threads"]) for r in rows}
    assert found == {(n, k, t, z, 1) for n, k in ((24, 40), (16, 8)) for t in (3, 18) for z in (50, 75)}
    for row in rows:
        assert row.keys() >= OP_FIELDS
        assert row["speedup"] == pytest.approx(row["dense_ms"] / row["sparse_ms"], rel=0.1)  # of rounded times
    assert sum("24 x 40" in line for line in printed) == 4


def test_op_with_float16_values(small_cache, capsys):
    assert run(main, ["op", "--shape", "16x32", "--tokens", "4", "--zeros", "50", "--threads", "1", "--float16"]) == 0
    assert len(json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]) == 2


@pytest.mark.parametrize("pattern", ["row", "layer"])
@pytest.mark.parametrize("zeros", [0, 50, 62.5, 90])
def test_patterns_have_the_zeros_that_they_say(pattern, zeros):
    dense = np.ones((40, 48), np.float32)
    S = pruned(dense, zeros, pattern, np.random.default_rng(0))
    assert np.count_nonzero(S == 0) == pytest.approx(zeros / 100 * S.size, abs=0.5 if pattern == "layer" else 20)
    counts = np.count_nonzero(S, axis=1)
    assert (len(set(counts)) == 1) == (pattern == "row" or zeros == 0)
    assert dense.all()


@pytest.mark.parametrize("copies", [1, 3])
def test_all_variants_compute_the_same_product(copies):
    random = np.random.default_rng(0)
    W = random.standard_normal((24, 40), np.float32) / math.sqrt(40)
    x = random.standard_normal((2, 5, 40), np.float32)
    expected = x @ W.T
    for model, tolerance in (
        (dense_model(W, copies), 1e-5),
        (sparse_model(W, copies, False), 1e-5),
        (int8_model(W, copies), 0.05),
    ):
        outputs = open_model(model, 1).run(None, {"x": x})
        assert np.abs(outputs[0] - expected).max() < tolerance * np.abs(expected).max()
        if copies > 1:
            assert outputs[1].shape == (copies - 1, 1, 1)


def test_no_two_copies_are_alike():
    """Of equal weights ONNX Runtime keeps one, and they would not come from memory."""
    W = np.random.default_rng(0).standard_normal((24, 40)).astype(np.float32)
    for model in (dense_model(W, 3), int8_model(W, 3), sparse_model(pruned(W, 50, "row", np.random.default_rng(1)), 3, False)):
        weights = [t.raw_data for t in model.graph.initializer if t.name.startswith(("w", "values", "mask"))]
        assert len(set(weights)) == len(weights)


def test_a_wrong_kernel_has_no_speed():
    S = np.eye(3, dtype=np.float32)
    x = np.ones((1, 1, 3), np.float32)
    check(S, x, x, 1e-4)
    with pytest.raises(AssertionError):
        check(S, x, 2 * x, 1e-4)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("op --shape 768", "--shape"),
        ("op --shape 0x8", "--shape"),
        ("op --shape axb", "--shape"),
        ("op --tokens 0", "--tokens"),
        ("op --tokens 8x", "--tokens"),
        ("op --zeros 100", "--zeros"),
        ("op --zeros -1", "--zeros"),
        ("op --threads 0", "--threads"),
        ("op --pattern block", "--pattern"),
        ("model --batch 0", "--batch"),
        ("model --compression 1.5 --model vit_tiny_patch16_224 --random-weights --img-size 32", "compression"),
        ("model --model vit_tiny_patch16_225", "vit_tiny_patch16_224"),
        ("", "op, model, solver"),
        ("speed", "op, model, solver"),
    ],
)
def test_bad_flags_are_one_line(flags, named, capsys):
    assert run(main, flags.split()) == 2
    said = capsys.readouterr()
    assert named in said.err.splitlines()[-1]
    assert "Traceback" not in said.err
    assert said.out == ""


@pytest.mark.slow
def test_model_measures_all_variants(capsys):
    flags = "model --model vit_tiny_patch16_224 --random-weights --img-size 64 --batch 2 --threads 1 --compression 0.5"
    assert run(main, flags.split()) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    variants = [r["variant"] for r in rows if not r["variant"].startswith("openvino")]
    assert variants == ["dense", "int8", "oats-50", "oats-50-float16", "oats-50-folded"]
    by = {r["variant"]: r for r in rows}
    assert all(r.keys() >= MODEL_FIELDS and r["model"] == "vit_tiny_patch16_224" for r in rows)
    assert by["oats-50-float16"]["file_mb"] < by["oats-50"]["file_mb"] < by["dense"]["file_mb"]
    assert by["oats-50-folded"]["file_mb"] == pytest.approx(by["dense"]["file_mb"], rel=0.01)
    assert all(r["rss_mb"] > 20 for r in rows if r["rss_mb"] is not None)


def test_layer_errors_are_those_of_the_outputs(tiny_folder, flat_images, capsys):
    """Every method's error, recomputed from inputs that a plain hook caught, for one that looks at nothing: magnitude."""
    flags = f"layers --model local-dir:{tiny_folder} --data-dir {flat_images} --nsamples 8 --blocks 1 --threads 1"
    result = main([*flags.split(), "--methods", "magnitude,alps", "--compression", "0.5"])
    assert "geometric mean" in capsys.readouterr().out
    errors = {(row["layer"], row["method"]): row["error"] for row in result["rows"]}
    assert len(errors) == 2 * 6  # q, k, v, proj, fc1, fc2
    assert all(errors[layer, "alps"] < errors[layer, "magnitude"] for layer, _ in errors)

    loaded = load_model(f"local-dir:{tiny_folder}")
    images = torch.cat(
        list(calibration_batches(open_images(flat_images, "train", loaded.preprocessing.transform()), 8, 42, 8, 0))
    )
    layer, caught = loaded.model.blocks[1].mlp.fc1, []
    layer.register_forward_pre_hook(lambda _m, args: caught.append(args[0].flatten(0, 1).double()))
    with torch.inference_mode():
        loaded.model(images)
    W = layer.weight.detach().double()
    small = W.abs() <= W.abs().flatten().kthvalue(W.numel() // 2).values
    expected = (caught[0] @ (W * small).T).norm() ** 2 / (caught[0] @ W.T).norm() ** 2
    assert errors["blocks.1.mlp.fc1", "magnitude"] == pytest.approx(expected.item(), rel=1e-3)


@pytest.mark.parametrize("blocks", ["1,x", "7"])
def test_layers_refuses_blocks_that_are_none(tiny_folder, flat_images, refuse, blocks):
    flags = f"layers --model local-dir:{tiny_folder} --data-dir {flat_images} --blocks {blocks}"
    assert "blocks" in refuse(main, *flags.split())


def test_files_are_compared_with_the_first(tiny_folder, plain, succeed, refuse, tmp_path):
    dense = f"local-dir:{tiny_folder}"
    for name, source in (("dense", [dense]), ("small", [plain]), ("large", [dense, "--img-size", "48"])):
        succeed(export_onnx, *source, "-o", tmp_path / f"{name}.onnx")
    files = [tmp_path / "dense.onnx", tmp_path / "small.onnx"]
    result = succeed(main, "files", *files, "--batch", "1", "--batch", "2", "--threads", "1")
    assert [(row["file"], row["batch"], row["native_nodes"]) for row in result["rows"]] == [
        (str(file), batch, native) for batch in (1, 2) for file, native in zip(files, (0, 12), strict=True)
    ]
    for row in result["rows"]:
        first = next(r for r in result["rows"] if r["batch"] == row["batch"])
        assert row["speedup"] == pytest.approx(first["ms"] / row["ms"], rel=0.02, abs=0.01)
    assert "--img-size" in refuse(main, "files", *files, tmp_path / "large.onnx", "--threads", "1")
    assert "nowhere.onnx" in refuse(main, "files", tmp_path / "nowhere.onnx")
