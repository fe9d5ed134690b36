"""Accuracy against compression and against bytes, as PNG and SVG."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# the eight colours of Okabe and Ito without black (the dense line) and yellow (too pale for lines); markers differ as well
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
INT8 = {"color": "#666666", "marker": "*", "markersize": 11, "linestyle": "none", "label": "int8 (ONNX Runtime)"}
SCALES = {"compression": 100, "bytes": 1e-6}
X_LABELS = {"compression": "weights removed from the compressed layers (%)", "bytes": "weights on disk (MB)"}
NEAR = 6.0  # percentage points below the dense model that the second panel shows


def plot_accuracy(path: Path, rows: Sequence[dict[str, Any]], x: str, title: str) -> None:
    """Writes ``path``.png and ``path``.svg: top-1 on the left, the paired difference from the dense model on the right.

    Args:
        path: without suffix.
        rows: of a comparison, the dense one first.
        x: "compression" or "bytes".
        title: above all.
    """
    figure = Figure(figsize=(11, 5), layout="constrained")
    accuracy, difference = figure.subplots(1, 2)
    _draw(accuracy, rows, x, "top1")
    accuracy.set_ylabel("top-1 (%)")
    difference.set_ylim(-NEAR, NEAR / 4)
    _draw(difference, rows, x, "vs_dense")
    difference.set_ylabel("top-1 minus dense (points)")
    figure.suptitle(f"{title}; bars are ± 2 standard errors (right: of the paired difference)", fontsize=11)
    figure.legend(*accuracy.get_legend_handles_labels(), loc="outside right center", frameon=False)
    with rc_context({"svg.hashsalt": "vitoats"}):  # the same figure is the same file
        figure.savefig(path.with_suffix(".png"), dpi=150)
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})


def _draw(axes: Axes, rows: Sequence[dict[str, Any]], x: str, y: str) -> None:
    dense, *others = rows
    axes.axhline(dense[y], color="black", linewidth=1, linestyle="--", label="dense")
    methods = list(dict.fromkeys(row["method"] for row in others if row["method"] != "int8"))
    curves: dict[tuple[str, str | None], list[dict[str, Any]]] = {}
    for row in sorted(others, key=lambda row: row[x]):
        curves.setdefault((row["method"], row["asked_pattern"]), []).append(row)
    if x == "bytes":
        axes.plot(dense[x] * SCALES[x], dense[y], color="black", marker="*", markersize=10)
    else:
        curves.pop(("int8", None), None)  # it removes no weights
    for (method, pattern), curve in sorted(curves.items(), key=lambda item: -min(row["top1"] for row in item[1])):
        style = INT8 if method == "int8" else _style(methods.index(method), method, pattern)
        bars = [2 * row[f"{y}_se"] if y == "top1" or row[y] > -NEAR else 0 for row in curve]  # none that hangs from nothing
        points = [row[x] * SCALES[x] for row in curve], [row[y] for row in curve]
        axes.errorbar(*points, bars, linewidth=1.5, elinewidth=1, capsize=2, **style)
    axes.set_xlabel(X_LABELS[x])
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _style(index: int, method: str, pattern: str | None) -> dict[str, Any]:
    """A method has one colour and one marker in all plots; a pattern that was asked for is dotted and hollow."""
    own = pattern == "own"
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "markersize": 5,
        "linestyle": "-" if own else ":",
        "markerfacecolor": None if own else "white",
        "label": method if own else f"{method} {pattern}",
    }
