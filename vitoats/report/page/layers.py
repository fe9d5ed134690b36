"""The error and the budget of each layer, as heat maps over blocks."""

from collections.abc import Sequence

from vitoats.report.page.document import Chart, Missing, Part, Section, Table, number
from vitoats.report.page.sources import Layer, Run

ROW_HEIGHT, BESIDE = 34, 100  # pixels of a row of a heat map, and of its axis and legend


def layers_section(runs: Sequence[Run]) -> Section | None:
    """The heat maps of all runs; None if there is no run."""
    parts: list[Part] = []
    for run in runs:
        prefix = f"{run.name}: " if len(runs) > 1 else ""
        if not run.layers:
            parts.append(Missing(f"{prefix}figures of the layers"))
            continue
        with_error = [layer for layer in run.layers if layer.error is not None]
        if with_error:
            parts.append(heat_map(f"{prefix}relative error of the output", with_error, "error"))
        parts.append(heat_map(f"{prefix}share of the weights removed", run.layers, "removed"))
    lead = (
        "Blocks from left to right, in the order in which they run. The error compares a layer's outputs with those of "
        "the dense layer for the same inputs: 0 is the same, 1 is as far off as no output at all."
    )
    return Section("layers", "Layers", lead, parts) if parts else None


def heat_map(title: str, layers: Sequence[Layer], value: str) -> Chart:
    """A heat map of "error" or "removed"; rows are layers of the same kind."""
    blocks = list(dict.fromkeys(layer.block for layer in layers))
    kinds = list(dict.fromkeys(layer.kind for layer in layers))
    scale, form, unit = (1.0, ".3f", "") if value == "error" else (100.0, ".0f", " %")
    values = [
        {
            "block": blocks.index(layer.block),
            "layer": layer.kind,
            "name": layer.name,
            "value": scale * getattr(layer, value),
            "rank": layer.rank,
            "steps": layer.steps,
        }
        for layer in layers
    ]
    spec = {
        "data": {"values": values},
        "mark": {"type": "rect", "cornerRadius": 2},
        "encoding": {
            "x": {
                "field": "block",
                "type": "ordinal",
                "title": "block",
                "axis": {"labelAngle": 0, "labelOverlap": True, "grid": False},
                "scale": {"paddingInner": 0.06},
            },
            "y": {
                "field": "layer",
                "type": "nominal",
                "title": None,
                "sort": kinds,
                "axis": {"grid": False, "labelLimit": 110},
                "scale": {"paddingInner": 0.08},
            },
            "color": {
                "field": "value",
                "type": "quantitative",
                "title": "error" if value == "error" else "removed (%)",
                "scale": {"zero": True} if value == "error" else {"domain": [0, 100]},
            },
            "tooltip": [
                {"field": "name", "type": "nominal", "title": "layer"},
                {"field": "value", "type": "quantitative", "format": form, "title": title.rpartition(": ")[2]},
                {"field": "rank", "type": "quantitative", "title": "rank"},
                {"field": "steps", "type": "quantitative", "title": "iterations"},
            ],
        },
    }
    most, least = (pick(layers, key=lambda layer: getattr(layer, value)) for pick in (max, min))

    def said(layer: Layer) -> str | None:
        return number(scale * getattr(layer, value), form, unit)

    alt = (
        f"Heat map of {len(kinds)} kinds of layers over {len(blocks)} blocks. Largest: {most.name}, {said(most)}; "
        f"smallest: {least.name}, {said(least)}."
    )
    by_place = {(layer.kind, layer.block): said(layer) for layer in layers}
    rows = [(kind, *(by_place.get((kind, block), "") for block in blocks)) for kind in kinds]
    table = Table("By layer and block", ("layer", *(f"{i}" for i in range(len(blocks)))), rows)
    return Chart(title[0].upper() + title[1:], alt, spec, table, height=BESIDE + ROW_HEIGHT * len(kinds))
