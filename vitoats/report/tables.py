"""Tables on stdout; numbers are not cut off when stdout is not a terminal."""

from collections.abc import Mapping, Sequence
from itertools import groupby

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vitoats.compression.pipeline import CompressionReport
from vitoats.compression.structural import PruningReport
from vitoats.format.counts import COUNTED, DEFINITIONS

PIPE_WIDTH = 120  # columns if stdout is not a terminal


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table; the first column is text, the others are numbers."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=PIPE_WIDTH)
    table = Table(box=None, pad_edge=False)
    for i, name in enumerate(header):
        table.add_column(name, justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console.print(title, style="bold", markup=False, highlight=False, soft_wrap=True)
    console.print(table)


def layer_table(report: CompressionReport) -> None:
    """Prints one row per compressed layer. Error is ``relative_error``, kept is nnz + r (d_in + d_out), both in percent."""
    print_table(
        f"{len(report.layers)} layers compressed, {report.compression:.2%} of their weights removed, {report.n_images} images",
        ("layer", "shape", "rank", "non-zeros", "kept %", "error %", "steps", "s"),
        [
            (
                row.name,
                f"{row.d_out} x {row.d_in}",
                "+".join(map(str, row.ranks)),
                f"{row.nonzeros}",
                f"{100 * row.kept_parameters / (row.d_out * row.d_in):.2f}",
                f"{100 * row.relative_error:.2f}",
                f"{row.steps}",
                f"{row.seconds:.2f}",
            )
            for row in report.layers
        ],
    )


def pruning_table(report: PruningReport) -> None:
    """Prints one row per attention or MLP."""
    print_table(
        f"{report.compression:.2%} of the weights of {len(report.modules)} attentions and MLPs removed "
        f"(a unit is {report.unit:.2%} at most), {report.n_images} images",
        ("module", "", "of", "kept", "weights", "error %", "s"),
        [
            (
                row.name,
                row.kind,
                f"{row.before}",
                f"{row.kept}",
                f"{row.weights}",
                f"{100 * row.relative_error:.2f}",
                f"{row.seconds:.2f}",
            )
            for row in report.modules
        ],
    )


def count_table(before: Mapping[str, int], after: Mapping[str, int]) -> None:
    """Prints the counts of the whole model before and after, with their definitions (``vitoats.format.counts``)."""
    rows = [
        (word, f"{before[key]:,}", f"{after[key]:,}", f"{100 * after[key] / before[key]:.1f}")
        for word, key in zip(DEFINITIONS, COUNTED, strict=True)
    ]
    print_table("the whole model, without a linear head of its own file", ("", "before", "after", "left %"), rows)
    for word, meaning in DEFINITIONS.items():
        print(f"{word}: {meaning}")


def skipped_lines(report: CompressionReport | PruningReport) -> list[str]:
    """One line for each reason why layers stay dense, with their names."""
    by_reason = groupby(sorted(report.skipped, key=lambda item: item[1]), key=lambda item: item[1])
    return [f"stays dense ({reason}): {', '.join(name for name, _ in items)}" for reason, items in by_reason]
