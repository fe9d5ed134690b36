"""Draws the pictures of docs/oats.md and docs/oats-h.md from the embedded model.

    python tools/draw_docs.py --output docs/images

The layer is fc1 of block 3, with its inputs in the dense model over 512 of the sample's images.
"""

import argparse
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from PIL import Image

from vitoats.benchmark.layers import compare_methods, layer_error
from vitoats.benchmark.matrices import Matrix, dense_matrices
from vitoats.common.files import atomic_write
from vitoats.data.images import SAMPLE, calibration_batches, open_images
from vitoats.loading.load import load_model
from vitoats.loading.names import EMBEDDED
from vitoats.methods.oats import OATSConfig, oats
from vitoats.methods.oats_h import OATSHConfig
from vitoats.methods.statistics import InputStatistics

LAYER, BLOCK = "blocks.3.mlp.fc1", 3
CORNER = 72  # rows and columns of the matrix that are shown
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"  # as in the plots of comparisons
COMPRESSIONS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
STEPS = (1, 2, 3, 5, 10, 20, 40, 80)


def matrix(nsamples: int) -> Matrix:
    """The layer's weights, and the moments of its inputs."""
    loaded = load_model(EMBEDDED)
    images = calibration_batches(open_images(SAMPLE, "train", loaded.preprocessing.transform()), nsamples, 42, 64, 0)
    return next(m for m in dense_matrices(loaded, images, nsamples, 64, [BLOCK], "full") if m.name == LAYER)


def figure_of(rows: int, columns: int, height: float) -> tuple[Figure, Any]:
    """A figure as wide as a page, in type that can be read on a phone; its ground is white in dark mode, too."""
    figure = Figure(figsize=(5.4, height), layout="constrained", facecolor="white")
    axes = figure.subplots(rows, columns)
    for each in axes.flat:
        each.tick_params(labelsize=9)
    return figure, axes


def draw_terms(m: Matrix) -> Figure:
    """W, S and U V side by side: the rows and columns in which U V is largest."""
    found = oats(m.weight, m.inputs, OATSConfig(compression=0.5, rank_ratio=0.25))
    low_rank = found.U @ found.V
    rows, columns = (low_rank.square().sum(dim).argsort(descending=True)[:CORNER].sort().values for dim in (1, 0))
    figure, axes = figure_of(1, 3, 1.95)
    titles = ("W", f"S: {(found.S == 0).float().mean():.1%} zeros", f"U V: rank {found.U.shape[1]}")
    top = m.weight[rows][:, columns].abs().quantile(0.98).item()
    for each, title, part in zip(axes, titles, (m.weight, found.S, low_rank), strict=True):
        each.imshow(part[rows][:, columns].numpy(), cmap="RdBu_r", vmin=-top, vmax=top, interpolation="nearest")
        each.set_title(title, fontsize=11)
        each.set_xticks([])
        each.set_yticks([])
    for between, sign in ((0, "≈"), (1, "+")):
        axes[between].annotate(sign, (1.09, 0.5), xycoords="axes fraction", ha="center", va="center", fontsize=15)
    return figure


def draw_outliers(m: Matrix) -> Figure:
    """The size of each input, and the error of the weights that it is multiplied by, with and without D."""
    size = m.inputs.second_moment.sqrt()
    order = size.argsort(descending=True)
    figure, (inputs, errors) = figure_of(2, 1, 4.4)
    inputs.plot((size / size.median())[order], color=BLUE)
    inputs.set_yscale("log")
    inputs.set_yticks([0.5, 1, 2, 4, 8], ["0.5", "1", "2", "4", "8"])
    inputs.minorticks_off()
    inputs.set_ylabel("root mean square\n(median = 1)", fontsize=10)
    for name, D, colour in (("without D", torch.ones_like(size), GREEN), ("OATS, with D", size, ORANGE)):
        found = oats(m.weight, InputStatistics(D.square()), OATSConfig(compression=0.5, rank_ratio=0.25))
        error = (m.weight - found.S - found.U @ found.V).square().sum(0) / m.weight.square().sum(0)
        errors.plot(100 * error[order], ".", color=colour, markersize=4, label=name)
    errors.set_ylim(bottom=0)
    errors.set_ylabel("error of a column\nof W (%)", fontsize=10)
    errors.set_xlabel("inputs of the layer, largest first", fontsize=10)
    errors.legend(fontsize=10)
    return figure


def draw_errors(m: Matrix) -> Figure:
    """The error of the layer's outputs after each step of OATS and at several compressions, against that of OATS-H."""
    figure, (steps, budgets) = figure_of(2, 1, 5.0)
    budget = {"compression": 0.6, "rank_ratio": 0.25}
    objective, error = [], []
    for count in STEPS:
        found = oats(m.weight, m.inputs, OATSConfig(**budget, iterations=count, tolerance=0))
        objective.append(found.relative_error**2)
        error.append(layer_error(m.weight, found.S + found.U @ found.V, m.inputs))
    best = compare_methods([m], {"oats-h": OATSHConfig(**budget)})[0].error
    steps.plot(STEPS, objective, "o-", color=BLUE, label="OATS: what it minimises")
    steps.plot(STEPS, error, "s-", color=ORANGE, label="OATS: error of the outputs")
    steps.axhline(best, color=GREEN, linestyle="--", label="OATS-H: error of the outputs")
    steps.set_xscale("log")
    steps.set_xticks(STEPS, [str(count) for count in STEPS])
    steps.minorticks_off()
    steps.set_xlabel("steps of the solver, 60 % removed", fontsize=10)
    for name, colour, marker in (("oats", ORANGE, "s"), ("oats-h", GREEN, "^")):
        config = {"oats": OATSConfig, "oats-h": OATSHConfig}[name]
        rows = [compare_methods([m], {name: config(compression=c, rank_ratio=0.25)})[0] for c in COMPRESSIONS]
        budgets.plot(
            [100 * c for c in COMPRESSIONS], [row.error for row in rows], f"{marker}-", color=colour, label=name.upper()
        )
    budgets.set_xlabel("weights removed (%)", fontsize=10)
    for each in (steps, budgets):
        each.set_yscale("log")
        each.set_ylabel("relative squared error", fontsize=10)
        each.grid(color="#dddddd", linewidth=0.6)
        each.legend(fontsize=9)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("docs/images"), help="folder of the PNG files")
    parser.add_argument("--nsamples", type=int, default=512, help="calibration images")
    args = parser.parse_args()
    m = matrix(args.nsamples)
    for name, draw in (("oats_terms", draw_terms), ("oats_outliers", draw_outliers), ("oats_h_errors", draw_errors)):
        drawn = BytesIO()
        draw(m).savefig(drawn, dpi=150, format="png")
        with atomic_write(args.output / f"{name}.png") as partial:
            Image.open(drawn).convert("RGB").quantize(128).save(partial, format="PNG", optimize=True)  # a third of the bytes
        print(args.output / f"{name}.png")


if __name__ == "__main__":
    main()
