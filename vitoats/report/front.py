"""Accuracy against milliseconds and against bytes: a plot, and the same as a table in Markdown."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from vitoats.common.files import atomic_write
from vitoats.report.plots import COLOURS

BELOW = 10.0  # points below the dense model; what is lower stands at the lower edge, with its value
WITHOUT_COMPRESSION: dict[str, dict[str, Any]] = {
    "dense": {"color": "black", "marker": "*", "markersize": 12},
    "int8": {"color": "#666666", "marker": "P", "markersize": 9},
    "native-int8": {"color": "black", "marker": "X", "markersize": 9},
}
NAMES = {
    "dense": "dense float32 (ONNX Runtime)",
    "int8": "dense int8 (ONNX Runtime)",
    "native-int8": "dense int8 (native operators)",
}
MARKERS = {"float32": ("o", "--"), "int8": ("s", "-")}
X = {"ms": (1.0, "milliseconds (log scale)"), "bytes": (1e-6, "file in MB (log scale)")}

Row = dict[str, Any]


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a table in Markdown."""
    header = ("model", "weights removed", "top-1 %", "vs dense", "ms", "over dense", "over int8", "MB", "of dense")
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for row in rows:
        removed = "" if row["target"] is None else f"{row['compression']:.0%}"
        cells = (
            _name(row),
            removed,
            f"{row['top1']:.2f}",
            ""
            if row["method"] == "dense"
            else f"{row['vs_dense']:+.2f} ± {row['vs_dense_se']:.2f}".replace("-", "\N{MINUS SIGN}"),
            f"{row['ms']:.2f}",
            f"{row['speedup']:.2f}x",
            f"{row['speedup_int8']:.2f}x",
            f"{row['bytes'] / 1e6:.1f}",
            f"{row['bytes'] / rows[0]['bytes']:.2f}x",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot_front(path: Path, rows: Sequence[Row], title: str) -> None:
    """Writes a PNG: top-1 against milliseconds on the left, against bytes on the right.

    Args:
        path: the file to write.
        rows: rows of a front (``vitoats.comparison.front``), the dense one first.
        title: title of the whole figure.
    """
    curves = _curves(row for row in rows if row["target"] is not None)
    methods = list(dict.fromkeys(method.removesuffix("-int8") for method, _ in curves))
    looks = {
        (method, weights): {
            "color": COLOURS[methods.index(method.removesuffix("-int8")) % len(COLOURS)],
            "marker": MARKERS[weights][0],
            "linestyle": MARKERS[weights][1],
            "fillstyle": "none" if weights == "float32" else "full",
        }
        for method, weights in curves
    }
    figure = Figure(figsize=(12, 5.5), layout="constrained")
    for axes, x in zip(figure.subplots(1, 2), X, strict=True):
        _draw(axes, x, rows, curves, looks)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(f"{title}\n% of the weights removed; ↓ top-1 of what is below the axis", fontsize=11)
    with atomic_write(path) as partial:
        figure.savefig(partial, dpi=150, format="png")


def _draw(
    axes: Axes,
    x: str,
    rows: Sequence[Row],
    curves: dict[tuple[str, str], list[Row]],
    looks: dict[tuple[str, str], dict[str, Any]],
) -> None:
    scale, label = X[x]
    dense = rows[0]
    edge = max(dense["top1"] - BELOW, min(row["top1"] for row in rows) - 1)
    for row in rows:
        if row["target"] is None:
            style = WITHOUT_COMPRESSION[row["method"]]
            axes.plot(scale * row[x], max(row["top1"], edge), linestyle="none", label=_name(row), **style)
    for key, curve in curves.items():
        points = [scale * row[x] for row in curve], [max(row["top1"], edge) for row in curve]
        axes.plot(*points, label=_name(curve[0]), markersize=6, linewidth=1.5, **looks[key])
        for i, (row, place) in enumerate(zip(curve, zip(*points, strict=True), strict=True)):
            words, color = f"{row['compression']:.0%}", looks[key]["color"]
            if row["top1"] < edge:  # two heights, as neighbours may be near each other
                words, offset, ha = f"{words}\n↓ {row['top1']:.0f}", (0, 18 + 26 * (i % 2)), "center"
            else:
                offset, ha = ((-7, 0), "right") if key[1] == "int8" else ((7, 0), "left")
            axes.annotate(words, place, offset, textcoords="offset points", ha=ha, va="center", fontsize=8, color=color)
    axes.axhline(dense["top1"], color="black", linewidth=0.8, linestyle=":")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(edge - 0.6, max(row["top1"] for row in rows) + 1)
    axes.set_xlabel(label)
    axes.set_ylabel("top-1 (%)")
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _curves(rows: Iterable[Row]) -> dict[tuple[str, str], list[Row]]:
    """The rows of each method and type of weights, from the least to the most that is removed."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["compression"]):
        found.setdefault((row["method"], row["weights"]), []).append(row)
    return found


def _name(row: Row) -> str:
    return NAMES.get(row["method"]) or f"{row['method'].removesuffix('-int8')}, {row['weights']}"
