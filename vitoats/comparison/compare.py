"""Runs a comparison: computes and stores the missing rows, then writes tables and plots."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from vitoats.common.errors import InputError, RunError
from vitoats.common.files import atomic_write, hold
from vitoats.common.json_files import to_json
from vitoats.common.progress import Progress, silent
from vitoats.comparison.bench import Bench, open_bench
from vitoats.comparison.plan import Run
from vitoats.comparison.rows import Row, compressed_row, dense_row, int8_row, remove_partial
from vitoats.compression.run import prepare
from vitoats.evaluation.store import RowStore
from vitoats.report.comparison import COLUMNS, PAIR_COLUMNS, pairs, rounded, write_csv
from vitoats.report.plots import plot_accuracy

log = logging.getLogger("vitoats")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The settings of a comparison.

    Attributes:
        runs: runs of all methods (``vitoats.comparison.plan``); they share model, images and resources.
        output: folder to write, or to continue.
        num_samples: number of test images, the first of a seeded shuffle; None for all.
        ood_dir: folder of out-of-domain images, for the out-of-domain columns.
        keep_models: keep the compressed folders in ``output``/models.
        skipped: a line for each combination that was left out, for the report.
    """

    runs: list[Run]
    output: Path
    num_samples: int | None = None
    ood_dir: Path | None = None
    keep_models: bool = False
    skipped: list[str] = field(default_factory=list)


def compare(comparison: Comparison, progress: Progress = silent) -> dict[str, Any]:
    """Computes the rows that ``output`` does not have yet, and writes tables and plots.

    Returns:
        the results, as in results.json.

    Raises:
        InputError: the runs do not suit the model or the images, or ``output`` holds something else.
        RunError: some rows failed; the others are in ``output``, and running the same comparison again retries the failed ones.
    """
    start = time.perf_counter()
    output, first = comparison.output, comparison.runs[0].job
    prepare(first.resources)
    bench = open_bench(first, comparison.num_samples, comparison.ood_dir, progress)
    with hold(output):
        return _make_rows(comparison, bench, RowStore(output, bench.settings), start)


def _make_rows(comparison: Comparison, bench: Bench, store: RowStore, start: float) -> dict[str, Any]:
    """Computes the missing rows; returns the results of all."""
    output = comparison.output
    jobs: list[tuple[str, str, dict[str, Any], Callable[[Row | None], Row]]] = [
        ("dense", "dense", {}, partial(dense_row, bench, output)),
        ("int8", "int8", {}, partial(int8_row, bench, output)),
    ]
    for run in comparison.runs:
        make = partial(compressed_row, bench, run, output, comparison.keep_models)
        jobs.append((run.name, str(run), run.settings, make))
    finished = {name: store.load(name, settings) for name, _, settings, _ in jobs}  # raises on a mismatch before any work
    rows: list[Row] = []
    failed: list[str] = []
    for i, (name, words, settings, made_by) in enumerate(jobs, 1):
        row = finished[name]
        log.info("[%d/%d] %s%s", i, len(jobs), words, " is done already" if row else "")
        try:
            if row is None:
                row = made_by(rows[0] if rows else None)
                store.save(name, settings, *row)
            remove_partial(output, name)
            rows.append(row)
        except (InputError, RunError) as error:
            if not rows:  # without the dense row there is nothing to compare with
                raise
            log.error("%s failed: %s", words, error)
            failed.append(words)
    result = write_results(comparison, bench, rows, failed, start)
    if failed:
        raise RunError(f"failed: {', '.join(failed)}; the other rows are in {output}, and the same command tries again")
    return result


def write_results(comparison: Comparison, bench: Bench, found: list[Row], failed: list[str], start: float) -> dict[str, Any]:
    """Writes rows.csv, pairs.csv, plots and results.json; returns the results."""
    output, data = comparison.output, comparison.runs[0].job.image_data
    rows = [rounded(row) for row, _ in found]
    runs = [(row, arrays) for row, arrays in found if row["asked_pattern"] is not None]
    differences = pairs([row for row, _ in runs], [arrays for _, arrays in runs])
    title = f"{bench.dense.name}, {rows[0]['n_images']} test images"
    write_csv(output / "rows.csv", COLUMNS, rows)
    write_csv(output / "pairs.csv", PAIR_COLUMNS, differences)
    for x in ("compression", "bytes"):
        plot_accuracy(output / f"accuracy_{x}", rows, x, title)
    result = {
        "model": bench.dense.name,
        "data_dir": data.images,
        "n_images": rows[0]["n_images"],
        "nsamples": data.nsamples,
        "seed": data.seed,
        "rows": [{name: row[name] for name in COLUMNS} for row in rows],
        "pairs": differences,
        "skipped": comparison.skipped,
        "failed": failed,
        "output": str(output),
        "seconds": round(time.perf_counter() - start, 1),
    }
    with atomic_write(output / "results.json") as aside:
        aside.write_text(to_json({**result, "settings": bench.settings}, indent=1))
    return result
