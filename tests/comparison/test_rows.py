"""Proves that a comparison is fair (same images, same budgets) and right (against direct computation)."""

import csv
import json
import math

import numpy as np
import pytest
import safetensors.torch
import torch

from tests.comparison.runs import RUNS, flags, per_image, row_of
from vitoats.cli import common
from vitoats.cli.compare import make_comparison, make_parser
from vitoats.cli.compress import main as compress
from vitoats.comparison.bench import LAYER_IMAGES, OOD_CROPS
from vitoats.data.images import open_images
from vitoats.loading.checkpoint import load_checkpoint
from vitoats.loading.load import load_model
from vitoats.report.comparison import COLUMNS, PAIR_COLUMNS, pairs


def test_a_row_for_each_run_in_the_order_of_the_flags(compared):
    folder, result = compared
    assert [tuple(row) for row in result["rows"]] == [COLUMNS] * 10
    assert [(r["method"], r["target"]) for r in result["rows"]] == [
        ("dense", None), ("int8", None), ("wanda", 0.3), ("wanda", 0.5), ("wanda", None), ("low", 0.3), ("low", 0.5),
        ("low", None), ("svd", 0.3), ("svd", 0.5),
    ]  # fmt: skip
    assert [r["pattern"] for r in result["rows"]] == [None, None, "row", "row", "2:4", "row", "row", "2:4", None, None]
    assert sorted(p.stem for p in (folder / "rows").glob("*.json")) == sorted(["dense", "int8", *RUNS])
    assert result["skipped"] == ["svd is left out for the pattern 2:4: it takes no pattern"]
    assert (result["n_images"], result["failed"]) == (20, [])


def test_where_nothing_can_be_allocated_an_allocation_makes_no_row(tiny_folder, data, tmp_path):
    argv = [*flags(tiny_folder, data, tmp_path / "out", "wanda,owl=wanda"), "--options=owl:allocation=owl"]
    comparison = make_comparison(make_parser().parse_args(argv))
    assert [run.name for run in comparison.runs] == [
        "wanda-own-0.3",
        "wanda-own-0.5",
        "wanda-2of4",
        "owl-own-0.3",
        "owl-own-0.5",
    ]
    assert comparison.skipped == ["owl is left out for the pattern 2:4: N:M leaves nothing to allocate"]


def test_compression_is_what_came_out(compared):
    _, result = compared
    assert row_of(result, "dense")["compression"] == row_of(result, "int8")["compression"] == 0
    assert row_of(result, "wanda-2of4")["compression"] == 0.5
    assert row_of(result, "low-2of4")["compression"] == pytest.approx(1 - 0.5 / 0.75, abs=0.02)  # n/m / (1 - kappa)
    for name in ("wanda-own-0.5", "low-own-0.5", "svd-own-0.5"):
        assert row_of(result, name)["compression"] == pytest.approx(0.5, abs=0.03)


def test_rows_csv_holds_the_same(compared):
    folder, result = compared
    with (folder / "rows.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    assert found == [{k: "" if v is None else str(v) for k, v in row.items()} for row in result["rows"]]
    stored = json.loads((folder / "results.json").read_text())
    assert {k: stored[k] for k in result} == result


def test_a_kept_model_is_what_compress_writes(compared, tiny_folder, data, tmp_path):
    """The comparison calibrates on the same images, and does the same, as compress by itself."""
    folder, _ = compared
    argv = f"--model local-dir:{tiny_folder} --data-dir {data} --method oats --compression 0.5 --rank-ratio 0.25 --iterations 3"
    argv += f" --nsamples 16 --batch-size 8 --threads 1 --quiet --output {tmp_path / 'alone'}"
    assert common.run(compress, argv.split()) == 0
    ours, alone = (
        safetensors.torch.load_file(str(f / "model.safetensors")) for f in (folder / "models/low-own-0.5", tmp_path / "alone")
    )
    assert ours.keys() == alone.keys()
    assert all(torch.equal(ours[k], alone[k]) for k in ours)


@pytest.mark.parametrize("name", ["low-own-0.5", "wanda-2of4"])
def test_accuracy_against_direct_evaluation(compared, data, name):
    """Hits, cosines and relative errors of a kept model, recomputed one image at a time."""
    folder, result = compared
    dense = load_model(json.loads((folder / "comparison.json").read_text())["model"])
    small = load_checkpoint(folder / "models" / name)
    dataset = open_images(str(data), "test", dense.preprocessing.transform())
    order = torch.randperm(30, generator=torch.Generator().manual_seed(42))[:20].tolist()
    hits, cosine, f, f_dense = [], [], [], []
    with torch.inference_mode():
        for i in order:
            image, label = dataset[i]
            hits.append(int(small.model(image[None]).argmax()) == label)
            a, b = (
                x.timm_model.forward_head(x.timm_model.forward_features(image[None]), pre_logits=True) for x in (small, dense)
            )
            cosine.append(torch.cosine_similarity(a, b).item())
            f.append(a[0])
            f_dense.append(b[0])
    f, f_dense = torch.stack(f).double(), torch.stack(f_dense).double()
    row = row_of(result, name)
    assert per_image(folder, name)["hits1"].tolist() == hits
    assert row["top1"] == 100 * np.mean(hits)
    assert row["cosine"] == pytest.approx(np.mean(cosine), rel=1e-4)
    error = (f - f_dense).square().sum() / (f_dense - f_dense.mean(dim=0)).square().sum()
    assert row["relative_error"] == pytest.approx(error.item(), rel=1e-4)
    assert row["top5"] == 100  # of 4 classes


def test_layer_error_against_direct_computation(compared, data):
    folder, result = compared
    dense = load_model(json.loads((folder / "comparison.json").read_text())["model"]).model
    small = load_checkpoint(folder / "models/low-own-0.3")
    dataset = open_images(str(data), "test", small.preprocessing.transform())
    order = torch.randperm(30, generator=torch.Generator().manual_seed(42))[: min(LAYER_IMAGES, 20)].tolist()
    inputs = {}
    names = [f"blocks.{i}.{layer}" for i in range(3) for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
    for name in names:
        small.model.get_submodule(name).register_forward_pre_hook(lambda _m, args, name=name: inputs.update({name: args[0]}))
    with torch.inference_mode():
        small.model(torch.stack([dataset[i][0] for i in order]))
        errors = []
        for name in names:
            x, layer, before = inputs[name], small.model.get_submodule(name), dense.get_submodule(name)
            E = x @ (before.weight - layer.weight).T
            errors.append((E.square().sum() / (x @ before.weight.T).square().sum()).item())
    assert row_of(result, "low-own-0.3")["layer_error"] == pytest.approx(np.mean(errors), rel=1e-3)
    assert row_of(result, "low-own-0.3")["layer_error"] < row_of(result, "low-own-0.5")["layer_error"]
    assert row_of(result, "int8")["layer_error"] is None


def test_bytes_are_those_of_the_weights_on_disk(compared, tiny_folder):
    folder, result = compared
    size = (folder / "models/wanda-2of4/model.safetensors").stat().st_size
    assert row_of(result, "wanda-2of4")["bytes"] == size
    dense = (tiny_folder / "model.safetensors").stat().st_size
    assert row_of(result, "dense")["bytes"] == pytest.approx(dense, rel=0.01)
    assert row_of(result, "dense")["bytes"] > max(size, row_of(result, "int8")["bytes"])
    # half of the weights as float32, and a bit for each
    layers = json.loads((folder / "models/wanda-2of4/vitoats.json").read_text())["layers"]
    weights = sum(layer["d_out"] * layer["d_in"] for layer in layers)
    assert dense - size == pytest.approx(weights * (4 - 2 - 1 / 8), rel=0.05)


def test_int8_is_near_the_dense_model_but_not_the_same(compared):
    _, result = compared
    row = row_of(result, "int8")
    assert 0 < row["relative_error"] < 0.05
    assert 0.98 < row["cosine"] < 1
    assert row["flops"] == row_of(result, "dense")["flops"]


def test_out_of_domain_columns(compared, photos):
    folder, result = compared
    assert per_image(folder, "dense")["ood_features"].shape == (3 * (1 + OOD_CROPS), 48)
    dense = row_of(result, "dense")
    assert (dense["ood_cosine"], dense["ood_relative_error"]) == (pytest.approx(1, abs=1e-6), 0)
    small = row_of(result, "low-own-0.5")
    assert small["ood_cosine"] < 1
    assert small["ood_relative_error"] > 0


def test_standard_errors_against_direct_computation(compared):
    folder, result = compared
    dense = per_image(folder, "dense")["hits1"]
    for name in ["int8", *RUNS]:
        row, hits = row_of(result, name), per_image(folder, name)["hits1"]
        n, p = len(hits), hits.mean()
        gained, lost = int((hits & ~dense).sum()), int((dense & ~hits).sum())
        assert row["top1_se"] == pytest.approx(100 * math.sqrt(p * (1 - p) / n), abs=1e-4)
        assert row["vs_dense"] == pytest.approx(100 * (gained - lost) / n, abs=1e-4)
        mcnemar = 100 * math.sqrt(gained + lost - (gained - lost) ** 2 / n) / n
        assert row["vs_dense_se"] == pytest.approx(mcnemar, abs=1e-4)


def test_pairs_are_all_those_of_one_pattern_and_compression(compared):
    folder, result = compared
    found = {(p["pattern"], p["target"], p["method_a"], p["method_b"]): p for p in result["pairs"]}
    expected = {("own", t, a, b) for t in (0.3, 0.5) for a, b in (("wanda", "low"), ("wanda", "svd"), ("low", "svd"))}
    assert found.keys() == expected | {("2:4", None, "wanda", "low")}
    a, b = (per_image(folder, f"{name}-own-0.5") for name in ("wanda", "svd"))
    pair = found["own", 0.5, "wanda", "svd"]
    assert pair["top1_difference"] == pytest.approx(100 * (a["hits1"].mean() - b["hits1"].mean()), abs=1e-3)
    d = a["cosine"].astype(float) - b["cosine"]
    assert pair["cosine_difference"] == pytest.approx(d.mean(), rel=1e-4)
    assert pair["cosine_difference_se"] == pytest.approx(math.sqrt(((d - d.mean()) ** 2).mean() / len(d)), rel=1e-4)
    assert found["2:4", None, "wanda", "low"]["compression_b"] == row_of(result, "low-2of4")["compression"]
    with (folder / "pairs.csv").open(newline="") as file:
        assert [tuple(row) for row in csv.DictReader(file)] == [PAIR_COLUMNS] * 7


def test_pairing_beats_comparing_two_standard_errors():
    """Two models that fail on the same images but for one: the difference is known far better than each accuracy."""
    hits = np.arange(100) % 2 == 0
    other = hits.copy()
    other[0] = False
    row = {"asked_pattern": "own", "target": 0.5, "compression": 0.5}
    images = [{"hits1": h, "cosine": np.ones(100)} for h in (hits, other)]
    [pair] = pairs([{"method": "a", **row}, {"method": "b", **row}], images)
    assert pair["top1_difference"] == 1
    assert pair["top1_difference_se"] == pytest.approx(100 * math.sqrt(0.01 * 0.99 / 100), abs=1e-4)
    assert pair["cosine_difference_se"] == 0
