"""The plots of a comparison."""

import json
import re

import numpy as np
from PIL import Image

from tests.comparison.runs import RUNS
from vitoats.report.plots import COLOURS, plot_accuracy


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


def rows_of(best: dict[str, float]) -> list[dict]:
    """Rows at two compressions for each method, by how far its better one is below the dense model."""
    dense = {"method": "dense", "asked_pattern": None, "top1": 80.0, "top1_se": 0.3, "vs_dense": 0.0, "vs_dense_se": 0.0}
    rows = [{**dense, "bytes": 2 * 10**7, "compression": 0.0}]
    for method, below in best.items():
        for compression, points in ((0.5, -below), (0.6, -2 * below)):
            own = {"method": method, "asked_pattern": "own", "top1": 80 + points, "vs_dense": points, "vs_dense_se": 0.2}
            rows.append({**dense, **own, "compression": compression, "bytes": 10**7 * (1 - compression)})
    return rows


def test_twelve_methods_have_twelve_colours_and_their_names_at_their_ends(tmp_path):
    """Names of curves that end at the same height do not lie on each other."""
    methods = [f"method{i:02}" for i in range(12)]
    plot_accuracy(tmp_path / "a", rows_of(dict.fromkeys(methods, 1.0)), "compression", "title")
    drawn = (tmp_path / "a.svg").read_text()
    assert len(set(COLOURS)) == 12
    assert all(colour.lower() in drawn for colour in COLOURS)
    assert all(drawn.count(f"<!-- {method} -->") == 3 for method in methods)  # in both panels and in the legend
    places = [float(y) for y in re.findall(r"<!-- method\d+ -->\s*<g [^>]*translate\([\d.]+ ([\d.]+)\)", drawn)][:12]
    assert len(places) == 12
    assert np.diff(sorted(places)).min() > 7


def test_methods_far_below_the_dense_model_are_in_the_second_panel(tmp_path):
    plot_accuracy(tmp_path / "a", rows_of({"good": 1.0, "poor": 14.0}), "compression", "title")
    with Image.open(tmp_path / "a.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    right = pixels[:, pixels.shape[1] // 2 : pixels.shape[1] * 4 // 5]
    colour = [int(COLOURS[1][i : i + 2], 16) for i in (1, 3, 5)]
    assert (right == colour).all(axis=2).sum() > 60
