"""The plots of a comparison."""

import json

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
