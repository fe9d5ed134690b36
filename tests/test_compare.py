"""Proves that a comparison is fair (same images, same budgets), right (against direct computation) and goes on after a stop."""

import csv
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from tests.conftest import write_image
from vitoats.checkpoint import load_checkpoint
from vitoats.cli import common
from vitoats.cli import compress as compress_command
from vitoats.cli.compare import LAYER_IMAGES, OOD_CROPS, make_parser
from vitoats.cli.compare import main as compare
from vitoats.cli.compare_plan import plan
from vitoats.cli.compress import main as compress
from vitoats.data.images import digest, open_images
from vitoats.models.loading import load_model
from vitoats.report.comparison import COLUMNS, PAIR_COLUMNS, pairs
from vitoats.report.plots import COLOURS, plot_accuracy

ROOT = Path(__file__).parent.parent
METHODS = "wanda,low=oats,svd"
RUNS = ["wanda-own-0.3", "wanda-own-0.5", "wanda-2of4", "low-own-0.3", "low-own-0.5", "low-2of4", "svd-own-0.3", "svd-own-0.5"]


def flags(model, data, output, methods=METHODS):
    """A small comparison."""
    return (
        f"--model local-dir:{model} --data-dir {data} --methods {methods} --compressions 0.3,0.5 --patterns own,2:4 "
        f"--nsamples 16 --num-samples 20 --batch-size 8 --threads 1 --quiet --output {output}"
    ).split() + [f"--options={options}" for options in ("low:rank_ratio=0.25,iterations=3",) if "low" in methods]


def one_run(model, data, output, *more):
    """A comparison of one run."""
    few = f"--model local-dir:{model} --data-dir {data} --methods wanda --nsamples 16 --threads 1 --quiet --output {output}"
    return [*few.split(), *map(str, more)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Images of 4 classes: train with 24, val with 30 others."""
    root = tmp_path_factory.mktemp("data")
    for i in range(54):
        write_image(root / ("train" if i < 24 else "val") / f"class{i % 4}" / f"{i:02}.png", i)
    return root


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """3 images of another kind and of other sizes."""
    root = tmp_path_factory.mktemp("photos")
    for i, size in enumerate((50, 64, 90)):
        write_image(root / f"{i}.png", 1000 + i, size)
    return root


@pytest.fixture(scope="module")
def compared(tiny_folder, data, photos, tmp_path_factory):
    """The whole comparison, once: its folder and what its JSON line said."""
    folder = tmp_path_factory.mktemp("compared") / "out"
    line = folder.parent / "line.json"
    argv = [*flags(tiny_folder, data, folder), "--keep-models", f"--ood-dir={photos}", f"--results-file={line}"]
    assert common.run(compare, argv) == 0
    return folder, json.loads(line.read_text())


@pytest.fixture
def copied(compared, tmp_path):
    """A copy of that folder, to break."""
    shutil.copytree(compared[0], tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture
def begun(copied):
    """A copy with the dense and the int8 row only."""
    shutil.rmtree(copied / "models")
    for file in (copied / "rows").iterdir():
        if file.stem not in ("dense", "int8"):
            file.unlink()
    return copied


def per_image(folder, name):
    with np.load(folder / "rows" / f"{name}.npz", allow_pickle=False) as arrays:
        return dict(arrays)


def row_of(result, name):
    """The row of a run by its name in files."""
    names = ["dense", "int8", *RUNS]
    return result["rows"][names.index(name)]


def refused(capsys, argv, status=2):
    """Runs a comparison that fails; gives its last line."""
    capsys.readouterr()
    assert common.run(compare, [str(a) for a in argv]) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    last = err.splitlines()[-1]
    assert last.startswith("error: ")
    return last


# ---- rows


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
    runs, skipped = plan(make_parser().parse_args(argv))
    assert [run.name for run in runs] == ["wanda-own-0.3", "wanda-own-0.5", "wanda-2of4", "owl-own-0.3", "owl-own-0.5"]
    assert skipped == ["owl is left out for the pattern 2:4: N:M leaves nothing to allocate"]


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


# ---- standard errors and pairs


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


# ---- going on


def test_the_same_command_again_makes_nothing_anew(compared, copied, tiny_folder, data, photos, monkeypatch, capsys):
    _, before = compared
    monkeypatch.setattr(compress_command, "compress_model", None)
    argv = [*flags(tiny_folder, data, copied), f"--ood-dir={photos}"]
    assert common.run(compare, argv) == 0
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (again["rows"], again["pairs"]) == (before["rows"], before["pairs"])


def test_a_stop_between_rows_loses_none(compared, begun, tiny_folder, data, photos, monkeypatch, capsys):
    argv = [*flags(tiny_folder, data, begun), f"--ood-dir={photos}"]
    real, made = compress_command.compress_model, []

    def stopped(args):
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(args.output.name)
        return real(args)

    monkeypatch.setattr(compress_command, "compress_model", stopped)
    assert common.run(compare, argv) == 130
    assert {p.stem for p in (begun / "rows").glob("*.json")} == {"dense", "int8", *RUNS[:3]}
    assert not (begun / "models").exists()
    monkeypatch.setattr(compress_command, "compress_model", lambda args: made.append(args.output.name) or real(args))
    capsys.readouterr()
    assert common.run(compare, argv) == 0
    assert made == RUNS
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    timeless = [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
    assert timeless == [{k: v for k, v in row.items() if k != "seconds"} for row in compared[1]["rows"]]
    assert not (begun / "models").exists()  # nobody asked to keep them


@pytest.mark.slow
def test_a_kill_loses_at_most_the_row_at_work(tiny_folder, data, tmp_path, capsys):
    argv = flags(tiny_folder, data, tmp_path / "out")
    process = subprocess.Popen([sys.executable, "tools/compare.py", *argv], cwd=ROOT, stdout=subprocess.DEVNULL)
    for _ in range(6000):
        if (tmp_path / "out/rows" / f"{RUNS[1]}.json").is_file():
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "out/rows").glob("*.json")}
    assert 4 <= len(times) < 10
    assert common.run(compare, argv) == 0
    assert all(p.stat().st_mtime_ns == t for p, t in times.items())
    assert len(json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]) == 10
    assert not (tmp_path / "out/models").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        # what all rows share
        (["--num-samples=10"], "num_samples was 20 and is now 10"),
        (["--nsamples=8"], "nsamples was 16 and is now 8"),
        (["--seed=1"], "seed was 42 and is now 1"),
        (["--img-size=48"], "preprocessing"),
        (["--ood-dir=DATA"], "out-of-domain images"),
        # what one row has for itself
        (["--options=low:iterations=4"], "iterations was 3 and is now 4"),
        (["--options=low:rank_ratio=0.2"], "rank_ratio was 0.25 and is now 0.2"),
        (["--methods=wanda,low=wanda,svd"], "method was oats and is now wanda"),
    ],
)
def test_other_settings_are_refused_in_words(copied, tiny_folder, data, photos, capsys, change, said):
    argv = [*flags(tiny_folder, data, copied), f"--ood-dir={photos}", *(c.replace("DATA", str(data)) for c in change)]
    if "low=wanda" in change[0]:
        argv = [a for a in argv if not a.startswith("--options")]
    before = {p: p.read_bytes() for p in copied.rglob("*") if p.is_file()}
    assert said in refused(capsys, argv)
    assert {p: p.read_bytes() for p in copied.rglob("*") if p.is_file()} == before


def test_other_weights_are_refused(copied, data, photos, tiny_folder, tmp_path, capsys):
    """The same name, another model."""
    shutil.copytree(tiny_folder, tmp_path / "tiny")
    path = tmp_path / "tiny/model.safetensors"
    state = safetensors.torch.load_file(str(path))
    state["head.bias"] += 1
    safetensors.torch.save_file(state, str(path), metadata={"format": "pt"})
    about = copied / "comparison.json"
    about.write_text(about.read_text().replace(str(tiny_folder), str(tmp_path / "tiny")))
    assert "weights (sha256)" in refused(capsys, [*flags(tmp_path / "tiny", data, copied), f"--ood-dir={photos}"])


def test_a_label_adds_a_row(copied, tiny_folder, data, photos, capsys):
    argv = [*flags(tiny_folder, data, copied, "wanda,low=oats,high=oats"), f"--ood-dir={photos}", "--patterns=own"]
    argv += ["--options=high:rank_ratio=0.5,iterations=3", "--compressions=0.5"]
    assert common.run(compare, argv) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [r["method"] for r in rows] == ["dense", "int8", "wanda", "low", "high"]
    assert rows[3]["relative_error"] != rows[4]["relative_error"]


@pytest.mark.parametrize("name", ["comparison.json", "rows/low-2of4.json", "rows/low-2of4.npz", "rows/dense.npz"])
def test_a_damaged_folder_is_reported(copied, tiny_folder, data, photos, capsys, name):
    (copied / name).write_bytes(b"{")
    line = refused(capsys, [*flags(tiny_folder, data, copied), f"--ood-dir={photos}"])
    assert Path(name).name.partition(".")[0] in line
    assert "delete" in line


def test_one_run_that_fails_does_not_stop_the_others(copied, tiny_folder, data, photos, capsys):
    """No layer here has a multiple of 5 inputs."""
    argv = [*flags(tiny_folder, data, copied, "wanda"), f"--ood-dir={photos}", "--patterns=2:5,own"]
    capsys.readouterr()
    assert common.run(compare, argv) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "multiple of 5" in err
    assert "failed: wanda 2:5" in err.splitlines()[-1]
    result = json.loads((copied / "results.json").read_text())
    assert [(r["method"], r["target"]) for r in result["rows"]] == [
        ("dense", None),
        ("int8", None),
        ("wanda", 0.3),
        ("wanda", 0.5),
    ]
    assert result["failed"] == ["wanda 2:5"]


def test_a_model_that_gives_no_numbers_is_no_row(begun, tiny_folder, data, photos, monkeypatch, capsys):
    real = compress_command.compress_model

    def broken(args):
        loaded, *rest = real(args)
        loaded.model.norm.weight.data[0] = float("nan")
        return loaded, *rest

    monkeypatch.setattr(compress_command, "compress_model", broken)
    argv = [*flags(tiny_folder, data, begun, "wanda"), f"--ood-dir={photos}", "--patterns=2:4"]
    assert "failed: wanda 2:4" in refused(capsys, argv, status=1)
    assert "NaN" not in (begun / "results.json").read_text()


# ---- bad input


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--methods=wanda,magic"], "unknown method 'magic'"),
        (["--methods=wanda,wanda"], "named twice"),
        (["--methods=wanda,"], "METHOD or LABEL=METHOD"),
        (["--methods=dense"], "always a row"),
        (["--methods=a/b=wanda,a:b=wanda"], "two runs would be called a_b"),
        (["--compressions=1.5"], "wanda, pattern own, compression 1.5"),
        (["--compressions=nan"], "--compression"),
        (["--compressions=half"], "list of numbers"),
        (["--patterns=column"], "unknown pattern"),
        (["--methods=svd", "--patterns=row,2:4"], "add own to --patterns"),
        (["--methods=oats", "--patterns=2:4", "--options=oats:rank_ratio=0.6"], "--options oats:NAME=VALUE"),
        (["--options=oats:iterations=3"], "names no method of --methods"),
        (["--options=wanda:damping=3"], "no option 'damping'"),
        (["--options=wanda:iterations=3"], "takes no --iterations"),
        (["--options=wanda:iterations"], "--options"),
        (["--options=wanda:compression=0.3"], "no setting of one method"),
        (["--options=wanda:seed=3"], "no setting of one method"),
        (["--options=wanda:fused_qkv=1"], "true, or left out"),
        (["--num-samples=0"], "--num-samples"),
        (["--num-samples=1"], "--num-samples"),
        (["--ood-dir=/no/such"], "/no/such"),
        (["--data-dir=FLAT"], "labels"),
        (["--output=FILE"], "--output"),
        (["--output=FULL"], "holds no comparison"),
        (["--device=banana"], "--device cpu"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(tiny_folder, data, flat_images, tmp_path, capsys, change, said):
    places = {"FLAT": flat_images, "FILE": tmp_path / "file", "FULL": tmp_path / "full"}
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.txt").write_text("years of work")
    for name, path in places.items():
        change = [c.replace(name, str(path)) for c in change]
    before = sorted(tmp_path.rglob("*"))
    assert said in refused(capsys, one_run(tiny_folder, data, tmp_path / "out", *change))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("missing", ["--output", "--methods", "--model", "--data-dir"])
def test_what_must_be_given(tiny_folder, data, tmp_path, capsys, missing):
    argv = one_run(tiny_folder, data, tmp_path / "out")
    at = argv.index(missing)
    assert missing in refused(capsys, argv[:at] + argv[at + 2 :])


def test_a_model_without_classifier_is_refused(data, tmp_path, capsys):
    argv = ["--model", "vit_small_patch14_dinov2", "--random-weights", "--img-size", "28", "--methods", "wanda", "--quiet"]
    assert "--head" in refused(capsys, [*argv, f"--data-dir={data}", f"--output={tmp_path / 'out'}"])


# ---- the pieces


def test_plots_show_every_method(compared, tmp_path):
    folder, _ = compared
    for x in ("compression", "bytes"):
        assert "</svg>" in (folder / f"accuracy_{x}.svg").read_text()
        with Image.open(folder / f"accuracy_{x}.png") as image:
            pixels = np.asarray(image.convert("RGB"))
        left = pixels[:, : pixels.shape[1] * 2 // 5]
        for colour in COLOURS[:3]:
            wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
            assert (left == wanted).all(axis=2).sum() > 30, (x, colour)
        assert (pixels != 255).any(axis=2).mean() > 0.02


def test_the_legend_of_many_methods_stays_on_the_page(tmp_path):
    figures = {"top1": 80.0, "top1_se": 0.3, "vs_dense": -1.0, "vs_dense_se": 0.2, "bytes": 10**7, "compression": 0.5}
    keys = [("dense", None), ("int8", None), *((f"method {i}", pattern) for pattern in ("own", "2:4") for i in range(30))]
    plot_accuracy(tmp_path / "many", [{"method": m, "asked_pattern": p, **figures} for m, p in keys], "bytes", "title")
    with Image.open(tmp_path / "many.png") as image:
        pixels = np.asarray(image.convert("L"))
    legend = pixels[:, int(0.82 * pixels.shape[1]) :]
    written = np.flatnonzero((legend < 200).any(axis=1))
    assert 5 < written[0] < written[-1] < len(legend) - 5


def test_the_same_figures_draw_the_same_svg(compared, tmp_path):
    rows = [json.loads((compared[0] / f"rows/{name}.json").read_text())["row"] for name in ("dense", "int8", *RUNS)]
    for name in ("a", "b"):
        plot_accuracy(tmp_path / name, rows, "bytes", "title")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_digests_tell_images_apart(data, image_tree, tmp_path):
    shutil.copytree(data, tmp_path / "copy")
    before = digest(open_images(str(data), "test", None))
    assert digest(open_images(str(tmp_path / "copy"), "test", None)) == before
    assert digest(open_images(str(data), "train", None)) != before
    os.rename(tmp_path / "copy/val/class1", tmp_path / "copy/val/class9")
    assert digest(open_images(str(tmp_path / "copy"), "test", None)) != before
    assert digest(open_images("sample", "train", None)) != digest(open_images("sample", "test", None))
