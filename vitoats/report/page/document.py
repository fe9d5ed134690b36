"""What a page consists of: sections of tables, charts, pictures and texts. The template knows how each of them is written.

All texts are plain; the template escapes them.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from PIL import Image

Cell = str | None  # None: missing


@dataclass(frozen=True)
class Table:
    """A table; the first column names the rows."""

    kind: ClassVar[str] = "table"
    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True)
class Chart:
    """A chart with the table of its values.

    Attributes:
        title: its heading.
        alt: what it shows, in words.
        spec: Vega-Lite, without title, size and colours.
        table: its values, or those that matter.
        height: in pixels.
    """

    kind: ClassVar[str] = "chart"
    title: str
    alt: str
    spec: dict[str, Any]
    table: Table
    height: int = 280


@dataclass(frozen=True)
class Missing:
    """Something that is not there, with the command that makes it."""

    kind: ClassVar[str] = "missing"
    what: str
    command: str = ""


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    kind: ClassVar[str] = "text"
    words: str


@dataclass(frozen=True)
class Facts:
    """The main figures, each as (name, figure, note)."""

    kind: ClassVar[str] = "facts"
    facts: Sequence[tuple[str, str, str]]


@dataclass(frozen=True)
class Picture:
    """A picture; ``src`` is a data: address."""

    src: str
    alt: str


@dataclass(frozen=True)
class Gallery:
    """A grid of pictures with a name for each row and column; cells may be empty."""

    kind: ClassVar[str] = "gallery"
    title: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Picture | None]]]


@dataclass(frozen=True)
class Passage:
    """A text whose tokens are coloured.

    Attributes:
        title: its heading.
        tokens: each token's text, its strength of colour from -1 to 1, and what to say about it.
        legend: what the colours mean.
    """

    kind: ClassVar[str] = "passage"
    title: str
    tokens: Sequence[tuple[str, float, str]]
    legend: str


@dataclass(frozen=True)
class Quotes:
    """Texts with a name each."""

    kind: ClassVar[str] = "quotes"
    title: str
    quotes: Sequence[tuple[str, str]]


Part = Table | Chart | Missing | Text | Facts | Gallery | Passage | Quotes


@dataclass(frozen=True)
class Section:
    """A section of the page; ``id`` is its address within it."""

    id: str
    title: str
    lead: str
    parts: list[Part] = field(default_factory=list)


def png(pixels: np.ndarray, alt: str) -> Picture:
    """A picture of uint8 pixels [height, width], [height, width, 3] or [height, width, 4]."""
    written = io.BytesIO()
    Image.fromarray(pixels).save(written, "PNG", optimize=True)
    return Picture("data:image/png;base64," + base64.b64encode(written.getvalue()).decode(), alt)


def number(value: float | None, form: str = ".3g", unit: str = "") -> Cell:
    """A number in words, with a proper minus sign; None stays None."""
    return None if value is None else format(value, form).replace("-", "\N{MINUS SIGN}") + unit


def size(n_bytes: float | None) -> Cell:
    """Bytes in 10^6 bytes, or in thousands where there are few."""
    if n_bytes is None:
        return None
    return f"{n_bytes / 1e6:,.1f} MB" if n_bytes >= 1e5 else f"{n_bytes / 1e3:,.1f} kB"
