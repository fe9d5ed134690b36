"""Inside chosen layers: the singular values of W, S and U V, and where S has its non-zeros."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vitoats.common.errors import InputError
from vitoats.format.layers import CompressedLinear
from vitoats.report.page.document import Chart, Gallery, Missing, Part, Picture, Section, Table, number, png
from vitoats.report.page.sources import Layer

ROWS, COLUMNS = 96, 128  # of the picture of a support, at most
LOWEST = 1e-3  # singular value that is drawn, as a share of the largest
COLOUR = (64, 120, 216)  # of a dense spot; a sparser one is more transparent
SUPPORT = "Where S has its non-zeros, and their share; a stronger colour is denser"
NAMES = {"W": "W (dense)", "S": "S (sparse)", "UV": "U V (low-rank)"}


@dataclass(frozen=True)
class Terms:
    """The matrices of a layer, [d_out, d_in] each; W is None if there is no dense model at hand."""

    name: str
    W: Tensor | None
    S: Tensor
    UV: Tensor

    @property
    def density(self) -> float:
        """Share of the entries of S that are not zero."""
        return float(torch.count_nonzero(self.S)) / self.S.numel()


def chosen_layers(layers: Sequence[Layer], named: Sequence[str]) -> list[str]:
    """The names of the layers to look into: those that are named, or one of each kind, from the middle block.

    Raises:
        InputError: there is no such layer.
    """
    known = [layer.name for layer in layers]
    for name in named:
        if name not in known:
            raise InputError(f"there is no compressed layer {name}: give `layers` some of {', '.join(known[:4])}, ...")
    if named:
        return list(dict.fromkeys(named))
    blocks = list(dict.fromkeys(layer.block for layer in layers))
    middle = blocks[len(blocks) // 2] if blocks else ""
    return [layer.name for layer in layers if layer.block == middle]


def terms_of(layer: CompressedLinear, name: str, dense: Tensor | None) -> Terms:
    """The matrices of a compressed layer; ``dense`` is W, possibly transposed as GPT-2 stores it."""
    UV = torch.cat([u @ v for u, v in zip(layer.U, layer.V, strict=True)])
    W = None if dense is None else dense.float()
    if W is not None and W.shape != UV.shape:
        W = W.T if W.T.shape == UV.shape else None
    return Terms(name, W, layer.S.float(), UV.float())


def singular_values(terms: Terms) -> dict[str, np.ndarray]:
    """The singular values of W, S and U V that are not zero, in falling order, as shares of the largest one of W.

    Without W they are shares of the largest one of S + U V.
    """
    matrices = {"W": terms.W, "S": terms.S, "UV": terms.UV}
    found = {key: torch.linalg.svdvals(M.double()).numpy() for key, M in matrices.items() if M is not None}
    largest = found["W"][0] if "W" in found else np.linalg.norm((terms.S + terms.UV).double().numpy(), 2)
    floor = 1e-6 * max(float(largest), 1e-300)
    return {key: values[values > floor] / (largest or 1.0) for key, values in found.items()}


def support_density(S: Tensor, rows: int = ROWS, columns: int = COLUMNS) -> np.ndarray:
    """The share of non-zeros of S in each cell of a grid of at most [rows, columns] cells."""
    mask = (S != 0).float()[None, None]
    shape = min(rows, S.shape[0]), min(columns, S.shape[1])
    return F.adaptive_avg_pool2d(mask, shape)[0, 0].numpy()


def weights_section(names: Sequence[str], layers: Mapping[str, CompressedLinear], dense: Mapping[str, Tensor]) -> Section:
    """The section for the layers of these names; ``dense`` holds those weights W that are known."""
    parts: list[Part] = []
    columns: list[str] = []
    pictures: list[Picture | None] = []
    for name in names:
        terms = terms_of(layers[name], name, dense.get(name))
        parts.append(decay_chart(terms))
        columns.append(f"{name}: {100 * terms.density:.1f} %")
        pictures.append(support_picture(terms))
    if not dense:
        parts.append(Missing("the singular values of the dense weights W", "add --dense MODEL"))
    parts.append(Gallery(SUPPORT, columns, [("outputs from top to bottom, inputs from left to right", pictures)]))
    lead = (
        "S keeps what is large and alone, U V what many rows share: the few large singular values. "
        "Values are shares of the largest one of W."
    )
    return Section("weights", "Weights", lead, parts)


def decay_chart(terms: Terms) -> Chart:
    """The singular values of a layer, on a logarithmic scale."""
    found = singular_values(terms)
    values: list[dict[str, Any]] = [
        {"term": NAMES[key], "index": i + 1, "value": float(value)}
        for key, all_of in found.items()
        for i, value in enumerate(all_of)
    ]
    lowest = max(LOWEST, min(row["value"] for row in values)) if values else LOWEST
    spec = {
        "data": {"values": values},
        "mark": {"type": "line", "strokeWidth": 2, "clip": True, "point": {"size": 90, "opacity": 0}},
        "encoding": {
            "x": {"field": "index", "type": "quantitative", "title": "index", "scale": {"nice": False}},
            "y": {
                "field": "value",
                "type": "quantitative",
                "title": "singular value (log scale)",
                "scale": {"type": "log", "nice": False, "domainMin": lowest},
                "axis": {"tickCount": 4, "format": "~g"},
            },
            "color": {"field": "term", "type": "nominal", "title": None, "sort": list(NAMES.values())},
            "strokeDash": {"field": "term", "type": "nominal", "legend": None, "sort": list(NAMES.values())},
            "tooltip": [
                {"field": "term", "type": "nominal"},
                {"field": "index", "type": "quantitative"},
                {"field": "value", "type": "quantitative", "format": ".4f"},
            ],
        },
    }
    longest = max(len(all_of) for all_of in found.values())
    marks = [2**i for i in range(longest.bit_length()) if 2**i <= longest]
    rows = [
        (f"{mark}", *(number(all_of[mark - 1]) if mark <= len(all_of) else "0" for all_of in found.values())) for mark in marks
    ]
    table = Table(f"Singular values of {terms.name}", ("index", *(NAMES[key] for key in found)), rows)
    first = ", ".join(f"{NAMES[key]} {all_of[0]:.2f}" for key, all_of in found.items() if len(all_of))
    alt = f"Singular values of {terms.name} in falling order. The largest: {first}. U V has rank {len(found['UV'])}."
    return Chart(f"Singular values of {terms.name}", alt, spec, table)


def support_picture(terms: Terms) -> Picture:
    """The support of S as a picture whose opacity is its density."""
    density = support_density(terms.S)
    most = max(float(density.max()), 1e-9)
    pixels = np.empty((*density.shape, 4), np.uint8)
    pixels[..., :3] = COLOUR
    pixels[..., 3] = np.round(255 * density / most)
    by_column = (terms.S != 0).float().mean(dim=0)
    return png(
        pixels,
        f"Support of S of {terms.name}: {100 * terms.density:.1f} % non-zeros; from {100 * by_column.min():.0f} to "
        f"{100 * by_column.max():.0f} % in a column.",
    )
