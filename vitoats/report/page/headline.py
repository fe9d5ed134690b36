"""Accuracy, bytes and latency: dense, dense int8 and compressed, as far as they were measured."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from vitoats.report.page.document import Facts, Missing, Part, Section, Table, number, size
from vitoats.report.page.sources import Results, Row, Run, Sources, figure, text

NEARLY = 1.0  # points of top-1
MANY = 12  # runs up to which each has its main figures; above, they are in a table alone


def headline(sources: Sources) -> Section:
    """The first section: the size of each compressed model, and all measurements."""
    parts: list[Part] = []
    for run in sources.runs if len(sources.runs) <= MANY else []:
        parts.append(Facts(facts_of(run)))
    if len(sources.runs) > 1:
        parts.append(_runs_table(sources.runs))
    for results in sources.results:
        main = three_models(results)
        parts += [Facts(main)] if main else []
        parts.append(results_table(results))
    parts += missing(sources)
    lead = "What was removed, what that costs in accuracy, and what it saves in bytes and time."
    if len(sources.results) > 1:
        lead += " Times of different tables are of different runs: compare them within a table only."
    return Section("headline", "Headline", lead, parts)


def facts_of(run: Run) -> list[tuple[str, str, str]]:
    """The main figures of a compressed model, from its vitoats.json."""
    about = run.about
    removed = figure(about, "compression")
    facts = [("weights removed", f"{100 * removed:.1f} %" if removed is not None else "unknown", run.name)]
    before, after = (figure(about.get(key), "bytes") for key in ("counts_before", "counts"))
    if before and after:
        facts.append(("bytes of all weights", str(size(after)), f"{after / before:.2f}x of {size(before)}"))
    before, after = (figure(about, key) for key in ("flops_before", "flops"))
    if before and after:
        unit = "an image" if not run.is_language_model else "a window"
        facts.append((f"multiply-adds for {unit}", f"{after / 1e9:.3g} G", f"{after / before:.2f}x of {before / 1e9:.3g} G"))
    errors = about.get("feature_error")
    for name in errors if isinstance(errors, dict) else ():
        error = figure(errors, name)
        if error is not None:
            facts.append(
                ("feature error", f"{error:.3f}", f"{_ERRORS.get(name, name)}; 0 as before, 1 no better than the mean")
            )
    return facts


_ERRORS = {"own": "on your held-out data", "synthetic": "on synthetic images", "general": "on general images"}


def three_models(results: Results) -> list[tuple[str, str, str]]:
    """Dense, dense int8, and the smallest compressed model that is nearly as accurate; empty where not all was measured."""
    whole = [row for row in results.rows if row.top1 is not None and row.ms is not None and row.bytes is not None]
    dense = next((row for row in whole if row.role == "dense"), None)
    if dense is None or not any(row.role == "compressed" for row in whole):
        return []
    names = {"dense": "dense", "int8": "dense int8, ONNX Runtime", "native-int8": "dense int8, native"}
    facts = [(names.get(row.name, row.name), *_said(row, dense)) for row in whole if row.role != "compressed"]
    near = [row for row in whole if row.role == "compressed" and (row.top1 or 0) >= (dense.top1 or 0) - NEARLY]
    if near:
        best = min(near, key=lambda row: row.bytes or 0)
        removed = f", {100 * best.removed:.0f} % removed" if best.removed else ""
        facts.append((f"smallest within {NEARLY:g} point of dense: {best.name}{removed}", *_said(best, dense)))
    return facts


def _said(row: Row, dense: Row) -> tuple[str, str]:
    faster = "" if row is dense or not row.ms else f" ({(dense.ms or 0) / row.ms:.1f}x as fast)"
    return f"{row.top1:.2f} %", f"{size(row.bytes)}, {row.ms:.2f} ms{faster}"


def results_table(results: Results) -> Table:
    """A table of measurements, with the columns that at least one row has beside the main three."""
    language = any(row.perplexity is not None for row in results.rows)
    removes = any(row.removed for row in results.rows)
    typed = any(row.weights for row in results.rows)
    columns = ["model", "perplexity" if language else "top-1", "bytes", "ms", *["removed"] * removes, *["weights"] * typed]
    rows = []
    for row in results.rows:
        accuracy = number(row.perplexity, ".2f") if language else number(row.top1, ".2f", " %")
        if accuracy and row.top1_se and not language:
            accuracy += f" ± {row.top1_se:.2f}"
        cells: list[str | None] = [row.name, accuracy, size(row.bytes), number(row.ms, ".2f")]
        if removes:
            cells.append(number(100 * row.removed, ".0f", " %") if row.removed else "")
        if typed:
            cells.append(row.weights or "")
        rows.append(cells)
    return Table(f"{results.file.name}: {results.conditions}", columns, rows)


def _runs_table(runs: Sequence[Run]) -> Table:
    rows = []
    for run in runs:
        counts, errors = run.about.get("counts") or {}, run.about.get("feature_error") or {}
        removed = figure(run.about, "compression")
        rows.append(
            [
                run.name,
                text(run.about, "method") or "",
                number(None if removed is None else 100 * removed, ".1f", " %"),
                size(figure(counts, "bytes")),
                number(figure(errors, "own")),
            ]
        )
    return Table("The compressed models", ("folder", "method", "removed", "bytes of all weights", "feature error"), rows)


def missing(sources: Sources) -> list[Missing]:
    """The numbers that nothing gives, with the commands that make them."""
    rows = [row for results in sources.results for row in results.rows]
    if sources.runs and sources.runs[0].is_language_model:
        return _missing_of_language(sources.runs[0], rows)
    said = []
    run = sources.runs[0] if sources.runs else None
    model, folder = (run.model, str(run.folder)) if run else ("MODEL", "DIR")
    file = f"{Path(folder).name}.onnx"
    if not any(row.role == "compressed" and row.top1 is not None for row in rows):
        command = f"python tools/eval_imagenet.py --model {_word(folder)} --data-dir IMAGES --results-file compressed.json"
        said.append(Missing("top-1 of the compressed model", command))
    if not any(row.role == "dense" and row.top1 is not None for row in rows):
        command = f"python tools/eval_imagenet.py --model {_word(model)} --data-dir IMAGES --results-file dense.json"
        said.append(Missing("top-1 of the dense model", command))
    timed = {row.role for row in rows if row.ms is not None}
    if not {"dense", "compressed"} <= timed:
        command = (
            f"python tools/export_onnx.py {_word(model)} -o dense.onnx; "
            f"python tools/export_onnx.py {_word(folder)} -o {_word(file)}; "
            f"python tools/benchmark.py files dense.onnx {_word(file)} --results-file ms.json"
        )
        said.append(Missing("milliseconds of the dense and the compressed model in ONNX Runtime", command))
    if not any(row.role == "int8" for row in rows):
        command = f"python tools/front.py --model {_word(model)} --data-dir IMAGES --output runs/front"
        said.append(Missing("the dense model in int8: accuracy, bytes and milliseconds", command))
    return said


def _missing_of_language(run: Run, rows: Sequence[Row]) -> list[Missing]:
    said = []
    if not any(row.perplexity is not None for row in rows):
        command = (
            f"python tools/eval_perplexity.py --model {_word(str(run.folder))} --data-dir TEXT --against {_word(run.model)} "
            "--results-file perplexity.json"
        )
        said.append(Missing("perplexity of the compressed and the dense model", command))
    if not any(row.ms is not None for row in rows):
        said.append(
            Missing(
                "milliseconds for a token",
                f"python tools/benchmark.py decode --model {_word(run.model)} --results-file ms.json",
            )
        )
    return said


def _word(text: str) -> str:
    """A text as one word of a command line, for people to paste."""
    return shlex.quote(text)
