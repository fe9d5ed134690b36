"""Accuracy against milliseconds and against bytes, where several models were measured."""

from collections.abc import Sequence
from typing import Any

from vitoats.report.page.document import Chart, Part, Section, Table, number, size
from vitoats.report.page.sources import Results, Row, Run, Sources, figure, text

FEWEST = 3  # points of a chart
BELOW = 10.0  # points of top-1
X = {"ms": ("milliseconds (log scale)", 1.0), "bytes": ("file in MB (log scale)", 1e-6)}


def fronts(sources: Sources) -> Section | None:
    """The charts; None if too little was measured."""
    parts: list[Part] = []
    for results in sources.results:
        for x in X:
            points = [row for row in results.rows if getattr(row, x) and _accuracy(row) is not None]
            if len(points) >= FEWEST:
                parts.append(front(results, points, x))
    if len(sources.runs) > 1:
        parts += error_against_bytes(sources.runs)
    lead = "The upper left is best: accurate, and fast or small. Lines join the budgets of one method."
    return Section("front", "Accuracy against time and size", lead, parts) if parts else None


def front(results: Results, rows: Sequence[Row], x: str) -> Chart:
    """Accuracy of the rows against ``x``, "ms" or "bytes"."""
    label, scale = X[x]
    language = rows[0].top1 is None
    measure = "perplexity" if language else "top-1"
    y_label = measure if language else "top-1 (%)"
    edge = lower_edge(rows)
    values = [
        {
            "model": _series(row),
            "removed": 100 * (row.removed or 0),
            "x": scale * (getattr(row, x) or 0),
            "y": _accuracy(row),
            "drawn": max(_accuracy(row) or 0.0, edge),
            "removes": row.role == "compressed",
        }
        for row in rows
    ]
    named: dict[str, Any] = {"field": "model", "type": "nominal", "scale": {"domain": list(dict.fromkeys(map(_series, rows)))}}
    tooltip: list[dict[str, Any]] = [
        {"field": "model", "type": "nominal"},
        {"field": "removed", "type": "quantitative", "format": ".0f", "title": "removed (%)"},
        {"field": "x", "type": "quantitative", "format": ".3~r", "title": label.partition(" (")[0]},
        {"field": "y", "type": "quantitative", "format": ".2f", "title": y_label},
    ]
    spec = {
        "data": {"values": values},
        "encoding": {
            "x": {
                "field": "x",
                "type": "quantitative",
                "title": label,
                "scale": {"type": "log", "nice": False, "padding": 16},
                "axis": {"format": "~g", "tickCount": 5, "labelOverlap": True},
            },
            "y": {
                "field": "drawn",
                "type": "quantitative",
                "title": y_label,
                "scale": {"zero": False, "padding": 12},
                "axis": {"tickCount": 6},
            },
        },
        "layer": [
            {
                "transform": [{"filter": "datum.removes"}],
                "mark": {"type": "line", "strokeWidth": 1.5},
                "encoding": {
                    "color": {**named, "title": None},
                    "order": {"field": "removed", "type": "quantitative"},
                },
            },
            {
                "mark": {"type": "point", "filled": True, "size": 80, "opacity": 1},
                "encoding": {"color": {**named, "title": None}, "shape": {**named, "title": None}, "tooltip": tooltip},
            },
        ],
    }
    best, first = max(rows, key=lambda row: _accuracy(row) or 0), min(rows, key=lambda row: getattr(row, x))
    alt = (
        f"{measure.capitalize()} against {label.partition(' (')[0]} of {len(rows)} models. "
        f"{'Highest' if language else 'Most accurate'}: {_series(best)}, {_accuracy(best):.2f}; "
        f"{'fastest' if x == 'ms' else 'smallest'}: {_series(first)}, {_accuracy(first):.2f}."
    )
    if any((_accuracy(row) or 0) < edge for row in rows):
        alt += f" What is below {edge:.1f} stands at the lower edge."
    cells = [
        (
            _series(row),
            number(100 * row.removed, ".0f", " %") if row.removed else "",
            number(row.ms, ".2f") if x == "ms" else size(row.bytes),
            number(_accuracy(row), ".2f"),
        )
        for row in rows
    ]
    table = Table(results.conditions, ("model", "removed", "milliseconds" if x == "ms" else "bytes", y_label), cells)
    title = f"{measure.capitalize()} against {'milliseconds' if x == 'ms' else 'megabytes'}"
    return Chart(title, alt, spec, table, height=340)


def lower_edge(rows: Sequence[Row]) -> float:
    """The top-1 below which nothing is told apart: ``BELOW`` points under the dense model, if there is one among the rows."""
    dense = [row.top1 for row in rows if row.role == "dense" and row.top1 is not None]
    return max(dense) - BELOW if dense else float("-inf")


def error_against_bytes(runs: Sequence[Run]) -> list[Chart]:
    """The feature errors of several compressed models against their bytes."""
    values: list[dict[str, Any]] = []
    for run in runs:
        error = figure(run.about.get("feature_error") or {}, "own")
        n_bytes = figure(run.about.get("counts") or {}, "bytes")
        if error is not None and n_bytes is not None:
            row = {"run": run.name, "method": text(run.about, "method") or "", "x": n_bytes / 1e6, "y": error}
            values.append(row)
    if len(values) < 2:
        return []
    spec = {
        "data": {"values": values},
        "mark": {"type": "point", "filled": True, "size": 90, "opacity": 1},
        "encoding": {
            "x": {"field": "x", "type": "quantitative", "title": "all weights in MB", "scale": {"zero": False, "padding": 16}},
            "y": {"field": "y", "type": "quantitative", "title": "feature error"},
            "color": {"field": "run", "type": "nominal", "title": None, "sort": None},
            "shape": {"field": "method", "type": "nominal", "title": None},
            "tooltip": [
                {"field": "run", "type": "nominal"},
                {"field": "method", "type": "nominal"},
                {"field": "x", "type": "quantitative", "format": ".1f", "title": "MB"},
                {"field": "y", "type": "quantitative", "format": ".4f", "title": "feature error"},
            ],
        },
    }
    best = min(values, key=lambda row: float(row["y"]))
    cells = [(row["run"], row["method"], f"{row['x']:.1f}", f"{row['y']:.4f}") for row in values]
    table = Table("Feature errors on held-out data", ("folder", "method", "MB", "feature error"), cells)
    alt = f"Feature error against bytes of {len(values)} compressed models; the least error has {best['run']}, {best['y']:.4f}."
    return [Chart("Feature error against size", alt, spec, table)]


def _accuracy(row: Row) -> float | None:
    return row.perplexity if row.top1 is None else row.top1


def _series(row: Row) -> str:
    """The name of the curve to which a point belongs."""
    if row.role == "dense":
        return "dense float32" if row.name == "dense" else row.name
    if row.role == "int8":
        return {"int8": "dense int8, ONNX Runtime", "native-int8": "dense int8, native"}.get(row.name, row.name)
    return f"{row.name.removesuffix('-int8')}, {row.weights}" if row.weights else row.name
