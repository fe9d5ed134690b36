"""Accuracy against milliseconds and bytes: rows of really exported files, their table and their plot."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from vitoats.cli.front import main as front
from vitoats.cli.repeat import main as repeat
from vitoats.evaluation.target import onnx_target
from vitoats.report.front import markdown, plot_front

METHODS = ["wanda", "wanda-int8", "numerical", "numerical-int8"]
FILES = ["dense", "int8", "native-int8", *(f"{method}-own-{rho}" for method in METHODS for rho in (0.3, 0.5))]


def flags(model, data, output):
    return (
        f"--model local-dir:{model} --data-dir {data} --methods wanda,numerical --compressions 0.3,0.5 --nsamples 16 "
        f"--num-samples 20 --batch-size 8 --batch 2 --threads 1 --quiet --output {output}"
    ).split()


@pytest.fixture(scope="module")
def measured(tiny_folder, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("front") / "out"
    return folder, front(flags(tiny_folder, data, folder))


def test_every_method_is_measured_in_float32_and_in_int8(measured):
    folder, result = measured
    rows = result["rows"]
    assert [row["file"] for row in rows] == [f"{name}.onnx" for name in FILES]
    assert [(row["method"], row["weights"]) for row in rows[:3]] == [
        ("dense", "float32"),
        ("int8", "int8"),
        ("native-int8", "int8"),
    ]
    assert {row["method"]: row["weights"] for row in rows[3:]} == {m: "int8" if "int8" in m else "float32" for m in METHODS}
    by = {row["file"].removesuffix(".onnx"): row for row in rows}
    for row in rows:
        assert row["bytes"] == (folder / row["file"]).stat().st_size
        assert row["speedup"] == pytest.approx(rows[0]["ms"] / row["ms"], rel=0.02)
        assert row["speedup_int8"] == pytest.approx(rows[1]["ms"] / row["ms"], rel=0.02)
        assert row["vs_dense"] == pytest.approx(row["top1"] - rows[0]["top1"], abs=1e-3)
        if row["target"]:
            assert row["compression"] == pytest.approx(row["target"], abs=0.1)
    assert by["wanda-own-0.5"]["bytes"] < by["wanda-own-0.3"]["bytes"] < by["dense"]["bytes"]
    lines = [json.loads(line) for line in (folder / "front.jsonl").read_text().splitlines()]
    assert [{key: line[key] for key in rows[0]} for line in lines] == rows
    assert {line["processor"] for line in lines} == {result["processor"]}
    assert (folder / "front.md").read_text() == markdown(rows)


@pytest.mark.slow
def test_a_repeated_front_has_the_same_files_and_figures_but_for_times(measured, tmp_path, succeed):
    found = succeed(repeat, measured[0], "--output", tmp_path / "again")
    words = found["differences"]
    assert words.pop("front.jsonl", "").startswith("the same figures, but for times")
    assert words.keys() <= {"front.md", "front.png"}  # which show times
    assert found["files_equal"] >= found["files"] - 3
    assert found["files"] > len(FILES)


def test_accuracy_is_that_of_the_file(measured, data):
    folder, result = measured
    row = next(row for row in result["rows"] if row["file"] == "wanda-int8-own-0.5.onnx")
    target = onnx_target(str(folder / row["file"]), 1)
    assert target.compression["compression"] == pytest.approx(row["compression"], abs=1e-6)
    assert (100 * 20 / 20) * round(row["top1"] / 5) == pytest.approx(row["top1"] / 5 * 100)  # whole images of 20


def test_only_missing_files_are_made_again(measured, tiny_folder, data, tmp_path, caplog):
    shutil.copytree(measured[0], tmp_path / "out")
    (tmp_path / "out" / "int8.onnx").unlink()
    (tmp_path / "out" / "wanda-own-0.3.onnx").write_bytes(b"damaged")
    with caplog.at_level("INFO", logger="vitoats"):
        result = front(flags(tiny_folder, data, tmp_path / "out"))
    assert [r.getMessage() for r in caplog.records if "making" in r.getMessage()] == [
        "[2/11] making int8.onnx",
        "[4/11] making wanda-own-0.3.onnx",
    ]
    timed = ("ms", "speedup", "speedup_int8")
    for before, after in zip(measured[1]["rows"], result["rows"], strict=True):
        assert {k: v for k, v in before.items() if k not in timed} == {k: v for k, v in after.items() if k not in timed}


def test_a_folder_of_something_else_is_left_alone(refuse, tiny_folder, data, tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    assert str(tmp_path) in refuse(front, *flags(tiny_folder, data, tmp_path)[:-1], tmp_path, warnings=True)


@pytest.mark.parametrize("label", ["native", "wanda-int8"])
def test_labels_of_its_own_rows_are_refused(refuse, tiny_folder, data, tmp_path, label):
    argv = ["--model", f"local-dir:{tiny_folder}", "--data-dir", data, "--output", tmp_path / "out"]
    assert label in refuse(front, *argv, "--methods", f"wanda,{label}=wanda")


def rows_of(lost):
    """Rows with these points lost at 40 to 70 %, twice as fast each time."""
    rows = [
        {"method": method, "weights": weights, "target": None, "compression": 0.0, "ms": ms, "bytes": size}
        for method, weights, ms, size in (
            ("dense", "float32", 20, 7e7),
            ("int8", "int8", 6, 2e7),
            ("native-int8", "int8", 3, 2e7),
        )
    ]
    for method, weights in (("oats-h", "float32"), ("oats-h-int8", "int8")):
        rows += [
            {"method": method, "weights": weights, "target": t, "compression": t, "ms": 10 / (1 + t), "bytes": 4e7 * (1 - t)}
            for t in (0.4, 0.5, 0.6, 0.7)
        ]
    return [
        row
        | {
            "top1": 88 - lost * row["compression"],
            "vs_dense": -lost * row["compression"],
            "vs_dense_se": 0.3,
            "speedup": 20 / row["ms"],
            "speedup_int8": 6 / row["ms"],
        }
        for row in rows
    ]


def test_the_table_is_markdown():
    lines = markdown(rows_of(4)).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert lines[2].startswith("| dense float32 (ONNX Runtime) |  | 88.00 |  | 20.00 | 1.00x | 0.30x | 70.0 | 1.00x |")
    assert "| oats-h, int8 | 50% | 86.00 | \N{MINUS SIGN}2.00 ± 0.30 |" in lines[-3]


@pytest.mark.parametrize("lost", [3, 60])
def test_all_points_are_within_the_plot(tmp_path, lost):
    plot_front(tmp_path / "front.png", rows_of(lost), "a title")
    with Image.open(tmp_path / "front.png") as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    blue = (np.abs(pixels - [0, 0x72, 0xB2]).sum(axis=2) < 10).any(axis=0)
    assert blue[: len(blue) // 2].sum() > 50  # on both panels
    assert blue[len(blue) // 2 :].sum() > 50
