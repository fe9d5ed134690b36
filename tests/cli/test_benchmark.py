"""The benchmark commands: their flags, their tables and the keys of their JSON lines. Never how long anything took."""

import json

import pytest
import torch

from vitoats.allocation.cost import CostTable
from vitoats.cli.benchmark import main
from vitoats.cli.common import run
from vitoats.cli.export_onnx import main as export_onnx
from vitoats.common.manifest import read_manifest
from vitoats.data.images import calibration_batches, open_images
from vitoats.loading.load import load_model

# keys of the JSON lines, and of their rows, which scripts read
OP = "processor isa fma_peak_gflops rows"
OP_ROW = (
    "n k tokens batch zeros pattern rank threads dense_ms int8_ms sparse_ms native_int8_ms sparse_int8_ms "
    "speedup native_int8_speedup sparse_int8_speedup nnz_gflops fma_share"
)
COSTS = "model weights img_size processor isa threads batch dense_ms sparse_ms sparse_int8_ms rest_ms rest_int8_ms rows"
COSTS_ROW = "n k blocks tokens layers zeros rank dense_ms sparse_ms dense_int8_ms sparse_int8_ms"
MODEL = "processor isa rank_ratio rank_ratio_int8 rows"
MODEL_ROW = "model weights img_size batch threads variant ms speedup speedup_int8 file_mb rss_mb"
SOLVER = "model weights iterations threads exact_seconds fast_seconds speedup objective_gap shapes"
FILES = "processor rows"
FILES_ROW = "file batch threads ms speedup native_nodes file_mb"
PROFILE = "file processor isa batch threads ms linear_ms rows"
PROFILE_ROW = "kind linear nodes ms share"
BUSY = "model weights processor isa processes threads tokens rows"
BUSY_ROW = "work variant batch alone_seconds together_seconds ratio"
LAYERS = "model compression threads geometric_means rows"
LAYERS_ROW = "layer method error seconds"


def check_keys(result, keys, row_keys=""):
    assert " ".join(result) == keys
    if row_keys:
        assert {" ".join(row) for row in result["rows"]} == {row_keys}


def test_op_measures_what_was_asked(small_cache, tmp_path, capsys):
    flags = "op --shape 24x40 --shape 16x8 --tokens 3 --tokens 2x9 --zeros 50 --zeros 75 --threads 1 --pattern row"
    assert run(main, [*flags.split(), "--results-file", str(tmp_path / "op.json")]) == 0
    printed = capsys.readouterr().out.splitlines()
    result = json.loads(printed[-1])
    assert json.loads((tmp_path / "op.json").read_text()) == result
    manifest = read_manifest(tmp_path / "op.json")
    assert manifest.argv[: len(flags.split())] == flags.split()
    assert manifest.result == result
    assert manifest.machine["processor"] == result["processor"]
    assert result["fma_peak_gflops"] > 0
    rows = result["rows"]
    found = {(r["n"], r["k"], r["tokens"], r["zeros"], r["threads"]) for r in rows}
    assert found == {(n, k, t, z, 1) for n, k in ((24, 40), (16, 8)) for t in (3, 18) for z in (50, 75)}
    check_keys(result, OP, OP_ROW)
    for row in rows:
        assert row["speedup"] == pytest.approx(row["dense_ms"] / row["sparse_ms"], rel=0.1)  # of rounded times
    assert sum("24 x 40" in line for line in printed) == 4


def test_op_with_float16_values(small_cache, capsys):
    assert run(main, ["op", "--shape", "16x32", "--tokens", "4", "--zeros", "50", "--threads", "1", "--float16"]) == 0
    assert len(json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]) == 2


def test_op_with_a_model_gives_its_table_of_costs(small_cache, tiny_folder, capsys, tmp_path):
    flags = ["--threads", "1", "--batch", "2", "--results-file", str(tmp_path / "costs.json")]
    assert run(main, ["op", "--model", f"local-dir:{tiny_folder}", *flags]) == 0
    printed = capsys.readouterr().out.splitlines()
    result = json.loads(printed[-1])
    check_keys(result, COSTS, COSTS_ROW)
    assert (result["threads"], result["batch"], result["img_size"]) == (1, 2, 32)
    assert CostTable.read(tmp_path / "costs.json") == CostTable.from_json(result)
    assert "are not linear layers" in printed[0]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("op --model vit_tiny_patch16_224 --shape 8x8", "--shape"),
        ("op --model vit_tiny_patch16_224 --zeros 50", "--zeros"),
        ("op --model vit_tiny_patch16_224 --rank 8", "--rank"),
        ("op --model vit_tiny_patch16_224 --threads 1 --threads 2", "--threads once"),
        ("op --model vit_tiny_patch16_225", "vit_tiny_patch16_224"),
        ("op --random-weights", "--model"),
        ("op --img-size 32", "--model"),
    ],
)
def test_flags_of_a_table_of_costs(refuse, flags, said):
    assert said in refuse(main, *flags.split())


def test_solver_times_the_matrices_of_a_block(tiny_folder, capsys):
    flags = ["--threads", "1", "--iterations", "2", "--block", "1"]
    assert run(main, ["solver", "--model", f"local-dir:{tiny_folder}", *flags]) == 0
    printed = capsys.readouterr().out.splitlines()
    result = json.loads(printed[-1])
    check_keys(result, SOLVER)
    assert result["shapes"] == [[48, 48]] * 4 + [[192, 48], [48, 192]]
    assert abs(result["objective_gap"]) < 0.05
    assert [line.split()[0] for line in printed[2:-1]] == [
        *(f"blocks.1.{name}" for name in ("attn.qkv[0]", "attn.qkv[1]", "attn.qkv[2]", "attn.proj", "mlp.fc1", "mlp.fc2")),
        "all",
    ]


def test_solver_refuses_a_block_that_is_none(tiny_folder, refuse):
    assert "blocks are 0 to 2" in refuse(main, "solver", "--model", f"local-dir:{tiny_folder}", "--block", "3")


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
        ("model --model vit_tiny_patch16_224 --random-weights --img-size 32 --variant oats-40", "oats-50, oats-50-float16"),
        ("", "op, model, decode, solver"),
        ("speed", "op, model, decode, solver"),
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
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    check_keys(result, MODEL, MODEL_ROW)
    rows = result["rows"]
    variants = [r["variant"] for r in rows if not r["variant"].startswith("openvino")]
    assert variants == [
        *("dense", "int8", "native-int8"),
        *("oats-50", "oats-50-float16", "oats-50-int8", "oats-50-folded"),
    ]
    by = {r["variant"]: r for r in rows}
    assert {(r["model"], r["weights"]) for r in rows} == {("vit_tiny_patch16_224", "random weights")}
    assert by["oats-50-int8"]["file_mb"] < by["oats-50-float16"]["file_mb"] < by["oats-50"]["file_mb"] < by["dense"]["file_mb"]
    assert by["oats-50-folded"]["file_mb"] == pytest.approx(by["dense"]["file_mb"], rel=0.01)
    assert all(r["rss_mb"] > 20 for r in rows)


def test_model_measures_the_variants_that_are_named(tiny_folder, capsys):
    flags = f"model --model local-dir:{tiny_folder} --batch 1 --threads 1 --compression 0.6 --variant oats-60"
    assert run(main, flags.split()) == 0
    *printed, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    check_keys(result, MODEL, MODEL_ROW)
    assert [row["variant"] for row in result["rows"]] == ["dense", "int8", "oats-60"]
    assert result["isa"] in printed[0]


def test_layer_errors_are_those_of_the_outputs(tiny_folder, flat_images, capsys):
    """Every method's error, recomputed from inputs that a plain hook caught, for one that looks at nothing: magnitude."""
    flags = f"layers --model local-dir:{tiny_folder} --data-dir {flat_images} --nsamples 8 --blocks 1 --threads 1"
    result = main([*flags.split(), "--methods", "magnitude,alps", "--compression", "0.5"])
    check_keys(result, LAYERS, LAYERS_ROW)
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
    check_keys(result, FILES, FILES_ROW)
    assert [(row["file"], row["batch"], row["native_nodes"]) for row in result["rows"]] == [
        (str(file), batch, native) for batch in (1, 2) for file, native in zip(files, (0, 12), strict=True)
    ]
    for row in result["rows"]:
        first = next(r for r in result["rows"] if r["batch"] == row["batch"])
        assert row["speedup"] == pytest.approx(first["ms"] / row["ms"], rel=0.02, abs=0.01)
    assert "--img-size" in refuse(main, "files", *files, tmp_path / "large.onnx", "--threads", "1")
    assert "nowhere.onnx" in refuse(main, "files", tmp_path / "nowhere.onnx")


def test_a_profile_says_what_linear_layers_take(plain, succeed, refuse, tmp_path):
    succeed(export_onnx, plain, "-o", tmp_path / "small.onnx")
    result = succeed(main, "profile", tmp_path / "small.onnx", "--threads", "1")
    check_keys(result, PROFILE, PROFILE_ROW)
    assert result["linear_ms"] == pytest.approx(sum(row["ms"] for row in result["rows"] if row["linear"]), abs=1e-3)
    assert 0 < result["linear_ms"] < result["ms"]
    assert "nowhere.onnx" in refuse(main, "profile", tmp_path / "nowhere.onnx")


def test_busy_compares_processes_at_once_with_one_alone(small_cache, tiny_folder, capsys):
    flags = "--processes 2 --threads 1 --rounds 1 --method oats --iterations 2 --nsamples 4 --batch-size 4 --batch 2 --runs 2"
    assert run(main, ["busy", "--model", f"local-dir:{tiny_folder}", *flags.split()]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    check_keys(result, BUSY, BUSY_ROW)
    assert (result["processes"], result["threads"], result["tokens"]) == (2, 1, 17)
    assert [(row["work"], row["variant"], row["batch"]) for row in result["rows"]] == [
        ("compression", "oats", 4),
        ("inference", "float32", 2),
        ("inference", "int8", 2),
    ]
