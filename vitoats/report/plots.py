"""Plots of accuracy against compression and against bytes, as PNG and SVG."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from vitoats.common.files import atomic_write

# Okabe and Ito's colours without black (the dense line) and those too pale for lines, plus Tol's indigo, wine, olive, teal and
# purple, and a brown
COLOURS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00"),
    *("#332288", "#882255", "#999933", "#44AA99", "#AA4499", "#7F4A1E"),
)
MARKERS = ("o", "s", "^", "D", "v", "P", "X")  # coprime to the number of colours, so 84 methods look different
PATTERNS = (("-", "full"), (":", "none"), ("--", "left"), ("-.", "right"))  # line style and marker fill
DENSE: dict[str, Any] = {"color": "black", "linewidth": 1, "linestyle": "--"}
INT8: dict[str, Any] = {"color": "#666666", "marker": "*", "markersize": 11, "linestyle": "none"}
SCALES = {"compression": 100, "bytes": 1e-6}
X_LABELS = {"compression": "weights removed from the compressed layers (%)", "bytes": "weights on disk (MB)"}
NEAR = 6.0  # percentage points below the dense model that the second panel shows at least
MOST_NAMES = 24  # curves up to which each has its name at its end


def plot_accuracy(path: Path, rows: Sequence[dict[str, Any]], x: str, title: str) -> None:
    """Writes ``path``.png and ``path``.svg: top-1 on the left, the paired difference from the dense model on the right.

    A method has the same colour and marker in all plots; a pattern has the same line style and marker fill.

    Args:
        path: file name without suffix.
        rows: rows of a comparison, the dense one first.
        x: "compression" or "bytes".
        title: title of the whole figure.
    """
    runs = [row for row in rows if row["asked_pattern"] is not None]
    methods, patterns = (list(dict.fromkeys(row[key] for row in runs)) for key in ("method", "asked_pattern"))
    looks: dict[str, dict[str, Any]] = {
        method: {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)], "markersize": 5}
        for i, method in enumerate(methods)
    }
    lines: dict[str, dict[str, Any]] = {
        pattern: dict(zip(("linestyle", "fillstyle"), PATTERNS[i % len(PATTERNS)], strict=True))
        for i, pattern in enumerate(patterns)
    }
    best_first = sorted(methods, key=lambda method: -min(row["top1"] for row in runs if row["method"] == method))
    legend = [Line2D([], [], label="dense", **DENSE), Line2D([], [], label="int8 (ONNX Runtime)", **INT8)][: 1 + (x == "bytes")]
    legend += [Line2D([], [], label=method, linestyle="none", **looks[method]) for method in best_first]
    if patterns != ["own"]:
        names = {pattern: "its own pattern" if pattern == "own" else pattern for pattern in patterns}
        legend += [Line2D([], [], label=names[p], color="#666666", marker="o", markersize=5, **lines[p]) for p in patterns]

    best = [max(row["vs_dense"] for row in runs if row["method"] == method) for method in methods]
    near = max([NEAR, *(-1.2 * points for points in best)])  # each method has a point in the second panel
    figure = Figure(figsize=(13, max(5, 0.26 * len(legend))), layout="constrained")
    accuracy, difference = figure.subplots(1, 2)
    for axes, y in ((accuracy, "top1"), (difference, "vs_dense")):
        _draw(axes, rows, x, y, looks, lines, near)
    accuracy.set_ylabel("top-1 (%)")
    difference.set_ylabel("top-1 minus dense (points)")
    difference.set_ylim(-near, near / 4)
    if len(methods) * len(patterns) <= MOST_NAMES:
        for axes, y in ((accuracy, "top1"), (difference, "vs_dense")):
            _name_ends(axes, runs, x, y, looks)
    figure.suptitle(f"{title}; bars are ± 2 standard errors (right: of the paired difference)", fontsize=11)
    figure.legend(handles=legend, loc="outside right center", frameon=False)
    with rc_context({"svg.hashsalt": "vitoats"}):  # the same figure gives the same bytes
        with atomic_write(path.with_suffix(".png")) as partial:
            figure.savefig(partial, dpi=150, format="png")
        with atomic_write(path.with_suffix(".svg")) as partial:
            figure.savefig(partial, metadata={"Date": None}, format="svg")


def _name_ends(axes: Axes, runs: Sequence[dict[str, Any]], x: str, y: str, looks: dict[str, Any]) -> None:
    """Writes each curve's name to the right of the axes, at the height of its last point, but not on each other."""
    ends: dict[tuple[str, str], dict[str, Any]] = {}
    for row in sorted(runs, key=lambda row: row[x], reverse=x == "bytes"):  # the last one has the most removed
        ends[row["method"], row["asked_pattern"]] = row
    low, high = axes.get_ylim()
    shown = sorted((row for row in ends.values() if row[y] >= low), key=lambda row: row[y])
    step, bottom = 0.042, 0.0
    heights = []
    for row in shown:
        bottom = max((row[y] - low) / (high - low), bottom)
        heights.append(bottom)
        bottom += step
    surplus = max(0.0, heights[-1] - 1) if heights else 0.0
    for row, height in zip(shown, heights, strict=True):
        name = row["method"] if row["asked_pattern"] == "own" else f"{row['method']} {row['asked_pattern']}"
        color = looks[row["method"]]["color"]
        axes.annotate(
            name,
            (row[x] * SCALES[x], row[y]),
            (1.02, height - surplus),
            textcoords="axes fraction",
            va="center",
            fontsize=8,
            color=color,
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.5, "alpha": 0.6},
        )


def _draw(
    axes: Axes,
    rows: Sequence[dict[str, Any]],
    x: str,
    y: str,
    looks: dict[str, Any],
    lines: dict[str, Any],
    near: float,
) -> None:
    dense = rows[0]
    axes.axhline(dense[y], **DENSE)
    curves: dict[tuple[str, str | None], list[dict[str, Any]]] = {}
    for row in sorted(rows[1:], key=lambda row: row[x]):
        curves.setdefault((row["method"], row["asked_pattern"]), []).append(row)
    if x == "bytes":
        axes.plot(dense[x] * SCALES[x], dense[y], color="black", marker="*", markersize=10)
    else:
        curves.pop(("int8", None), None)  # int8 removes no weights
    for (method, pattern), curve in curves.items():
        style = INT8 if pattern is None else looks[method] | lines[pattern]
        bars = [2 * row[f"{y}_se"] if y == "top1" or row[y] > -near else 0 for row in curve]  # no bars for points out of range
        points = [row[x] * SCALES[x] for row in curve], [row[y] for row in curve]
        axes.errorbar(*points, bars, linewidth=1.5, elinewidth=1, capsize=2, **style)
    axes.set_xlabel(X_LABELS[x])
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
