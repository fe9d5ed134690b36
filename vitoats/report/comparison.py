"""The tables of a comparison: its rows, and paired differences between methods. See docs/compare.md for the columns."""

import csv
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from vitoats.common.files import atomic_write
from vitoats.evaluation.paired import paired_difference
from vitoats.report.tables import print_table

COLUMNS = (
    "method", "compression", "target", "pattern", "top1", "top1_se", "vs_dense", "vs_dense_se", "top5", "cosine",
    "relative_error", "layer_error", "ood_cosine", "ood_relative_error", "bytes", "flops", "seconds",
)  # fmt: skip
PAIR_COLUMNS = (
    "pattern", "target", "method_a", "compression_a", "method_b", "compression_b", "top1_difference", "top1_difference_se",
    "cosine_difference", "cosine_difference_se",
)  # fmt: skip
DECIMALS = {
    "compression": 6,
    "top1": 4,
    "top1_se": 4,
    "vs_dense": 4,
    "vs_dense_se": 4,
    "top5": 4,
    "seconds": 1,
    "top1_difference": 4,
    "top1_difference_se": 4,
}  # fmt: skip  (of columns that are not rounded to six significant digits)


def rounded(row: dict[str, Any]) -> dict[str, Any]:
    """A row rounded to meaningful digits."""

    def value(name: str, x: Any) -> Any:
        if not isinstance(x, float):
            return x
        return round(x, DECIMALS[name]) if name in DECIMALS else float(f"{x:.6g}")

    return {name: value(name, x) for name, x in row.items()}


def pairs(rows: Sequence[dict[str, Any]], per_image: Sequence[dict[str, np.ndarray]]) -> list[dict[str, Any]]:
    """The paired difference a - b of every two runs with the same requested pattern and compression.

    Args:
        rows: figures of the runs.
        per_image: hits1 bool [n] and cosine [n] of each run, on the same images.
    """
    found = []
    for (a, of_a), (b, of_b) in combinations(zip(rows, per_image, strict=True), 2):
        if (a["asked_pattern"], a["target"]) != (b["asked_pattern"], b["target"]):
            continue
        top1, top1_se = paired_difference(100 * of_a["hits1"].astype(float), 100 * of_b["hits1"].astype(float))
        cosine, cosine_se = paired_difference(of_a["cosine"], of_b["cosine"])
        values = (
            a["asked_pattern"], a["target"], a["method"], a["compression"], b["method"], b["compression"],
            top1, top1_se, cosine, cosine_se,
        )  # fmt: skip
        found.append(rounded(dict(zip(PAIR_COLUMNS, values, strict=True))))
    return found


def write_csv(path: Path, columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    """Writes rows as CSV; None becomes an empty cell.

    Raises:
        RunError: the file cannot be written.
    """
    with atomic_write(path, "free some space and repeat the command") as partial, partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def comparison_table(title: str, rows: Sequence[dict[str, Any]]) -> None:
    """Prints the main columns of a comparison."""

    def cell(row: dict[str, Any], name: str, form: str, scale: float = 1) -> str:
        return "" if row[name] is None else format(row[name] * scale, form)

    print_table(
        title,
        ("method", "pattern", "removed %", "top-1 %", "vs dense", "top-5 %", "cosine", "rel. error", "MB", "GFLOPs", "s"),
        [
            (
                row["method"],
                row["pattern"] or "",
                cell(row, "compression", ".2f", 100),
                f"{row['top1']:.2f} ± {row['top1_se']:.2f}",
                "" if row["method"] == "dense" else f"{row['vs_dense']:+.2f} ± {row['vs_dense_se']:.2f}",
                cell(row, "top5", ".2f"),
                cell(row, "cosine", ".4f"),
                cell(row, "relative_error", ".4f"),
                cell(row, "bytes", ".2f", 1e-6),
                cell(row, "flops", ".3f", 1e-9),
                cell(row, "seconds", ".1f"),
            )
            for row in rows
        ],
    )


def perplexity_table(title: str, rows: Sequence[dict[str, Any]]) -> None:
    """Prints the rows of a language model's comparison, the dense one first: two columns for each test."""

    def row_cells(row: dict[str, Any]) -> Iterator[str]:
        dense = row["method"] == "dense"
        yield row["method"]
        yield "" if dense else row["pattern"]
        yield "" if dense else f"{100 * row['compression']:.2f}"
        for test, perplexity in row["perplexity"].items():
            yield f"{perplexity:.2f}"
            error = row["log_difference_se"][test]  # None for a single window
            yield "" if dense else f"{row['log_difference'][test]:+.3f}" + ("" if error is None else f" ± {error:.3f}")

    tests = [name for test in rows[0]["perplexity"] for name in (test, "vs dense")]
    print_table(title, ("method", "pattern", "removed %", *tests), [tuple(row_cells(row)) for row in rows])
