"""Accuracy against milliseconds and bytes: exported files of several methods, measured as they would be deployed, in one run.

Unlike ``vitoats.comparison.compare``, which evaluates folders in torch, a row at a time, everything here is measured on the
exported files in ONNX Runtime, and the files take turns. So the making of files may be interrupted and continued, but their
measurement is always that of one run.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vitoats.benchmark.files import FileTimes, compare_files
from vitoats.common.file_digests import file_sha256
from vitoats.common.files import atomic_write, hold
from vitoats.common.json_files import to_json
from vitoats.common.machine import processor
from vitoats.common.progress import Progress, silent
from vitoats.comparison.bench import Bench, open_bench
from vitoats.comparison.plan import Run
from vitoats.compression.run import prepare
from vitoats.compression.run import run as compress
from vitoats.evaluation.accuracy import evaluate
from vitoats.evaluation.paired import binomial_se, paired_difference
from vitoats.evaluation.store import RowStore
from vitoats.evaluation.target import onnx_target
from vitoats.export.int8 import quantize
from vitoats.export.onnx_file import described_by, export_onnx
from vitoats.report.front import markdown, plot_front
from vitoats.runtime import library

DENSE, INT8, NATIVE_INT8 = "dense", "int8", "native-int8"  # always made: by nobody, by ONNX Runtime, with our operators
TURN_SECONDS = 0.3  # that a file runs before the next one has its turn

log = logging.getLogger("vitoats")


@dataclass(frozen=True, kw_only=True)
class Front:
    """The settings of a front.

    Attributes:
        runs: runs of all methods (``vitoats.comparison.plan``); they share model, images and resources.
        output: folder to write, or to continue: the exported files, and the results.
        num_samples: number of test images, the first of a seeded shuffle; None for all.
        batch: batch size of the latency.
    """

    runs: list[Run]
    output: Path
    num_samples: int | None = None
    batch: int = 1


@dataclass(frozen=True)
class Candidate:
    """A file to measure.

    Attributes:
        method: the label of its method.
        weights: "float32" or "int8".
        target: the requested compression; None if nothing was to be removed.
        file: the exported file.
        compression: the share of weights actually removed.
    """

    method: str
    weights: str
    target: float | None
    file: Path
    compression: float


def measure_front(front: Front, progress: Progress = silent) -> dict[str, Any]:
    """Makes the files that ``output`` does not have yet, measures all, and writes tables and a plot.

    Returns:
        the results, of which ``rows`` are also written to front.jsonl.

    Raises:
        InputError: the runs do not suit the model or the images, or ``output`` holds something else.
        RunError: a file cannot be written.
    """
    first = front.runs[0].job
    prepare(first.resources)
    bench = open_bench(first, front.num_samples, None, progress)
    with hold(front.output):
        store = RowStore(front.output, bench.settings)
        candidates = _make_files(front, bench, store)
        hits = {candidate.file: _hits(candidate, bench) for candidate in candidates}
        times = compare_files([c.file for c in candidates], [front.batch], [bench.threads], TURN_SECONDS)
        int8_ms = next(time.ms for time in times if time.file == str(front.output / f"{INT8}.onnx"))
        dense = hits[candidates[0].file]
        rows = [_row(c, hits[c.file], dense, time, int8_ms) for c, time in zip(candidates, times, strict=True)]
        return _write(front, bench, rows)


def _make_files(front: Front, bench: Bench, store: RowStore) -> list[Candidate]:
    """Makes the missing files; those of the dense model come first."""
    dense, int8, native = (front.output / f"{name}.onnx" for name in (DENSE, INT8, NATIVE_INT8))
    about = described_by({}, bench.dense.name)

    def write(file: Path, int8: bool) -> float:
        export_onnx(bench.dense, file, about=about, int8=int8)
        return 0.0

    def write_quantized(file: Path) -> float:
        quantize(dense, file)
        return 0.0

    makers: list[tuple[str, str, float | None, Path, dict[str, Any], Callable[[Path], float]]] = [
        (DENSE, "float32", None, dense, {}, partial(write, int8=False)),
        (INT8, "int8", None, int8, {}, write_quantized),
        (NATIVE_INT8, "int8", None, native, {}, partial(write, int8=True)),
    ]
    for run in front.runs:
        file = front.output / f"{run.name}.onnx"
        makers.append((run.label, run.job.weights, run.compression, file, run.settings, partial(_write_compressed, bench, run)))
    candidates = []
    for done, (method, weights, target, file, settings, write_file) in enumerate(makers, 1):
        kept = store.load(file.stem, settings)
        if kept is None or not file.is_file() or file_sha256(file) != kept[0]["sha256"]:
            log.info("[%d/%d] making %s", done, len(makers), file.name)
            kept = {"compression": write_file(file), "sha256": file_sha256(file)}, {}
            store.save(file.stem, settings, *kept)
        candidates.append(Candidate(method, weights, target, file, kept[0]["compression"]))
    return candidates


def _write_compressed(bench: Bench, run: Run, file: Path) -> float:
    """Compresses and exports a model; returns the share of weights that was removed."""
    compressed = compress(run.job, scratch=file.parent, progress=bench.progress)
    export_onnx(compressed.vision_model, file, about=described_by(compressed.about, bench.dense.name))
    return compressed.report.compression


def _hits(candidate: Candidate, bench: Bench) -> np.ndarray:
    """Whether each test image is classified right, bool [n]."""
    predict = onnx_target(str(candidate.file), bench.threads).predict
    name = candidate.file.stem
    result = evaluate(
        predict,
        bench.images(),
        bench.n_classes,
        lambda seen: bench.progress(f"evaluating {name}", seen.n_images, bench.n_images, ""),
    )
    return np.array(result.hits1)


def _row(candidate: Candidate, hits: np.ndarray, dense: np.ndarray, time: FileTimes, int8_ms: float) -> dict[str, Any]:
    difference, difference_se = paired_difference(100.0 * hits, 100.0 * dense)
    return {
        "method": candidate.method,
        "weights": candidate.weights,
        "target": candidate.target,
        "compression": round(candidate.compression, 6),
        "top1": round(100 * float(hits.mean()), 4),
        "top1_se": round(binomial_se(hits), 4),
        "vs_dense": round(difference, 4),
        "vs_dense_se": round(difference_se, 4),
        "ms": time.ms,
        "speedup": time.speedup,
        "speedup_int8": round(int8_ms / time.ms, 3),
        "bytes": candidate.file.stat().st_size,
        "native_nodes": time.native_nodes,
        "file": candidate.file.name,
    }


def _write(front: Front, bench: Bench, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Writes front.jsonl, front.md and front.png; returns the results."""
    machine = {
        "model": bench.dense.name,
        "img_size": bench.dense.preprocessing.img_size,
        "n_images": bench.n_images,
        "batch": front.batch,
        "threads": bench.threads,
        "processor": processor(),
        "isa": library.isa() if library.library_path() else None,
    }
    title = f"{machine['model']}, {machine['img_size']} px, batch {front.batch}, {bench.n_images} test images; {processor()}"
    for name, text in (
        ("front.jsonl", "".join(to_json(machine | row) + "\n" for row in rows)),
        ("front.md", markdown(rows)),
    ):
        with atomic_write(front.output / name) as partial_file:
            partial_file.write_text(text)
    plot_front(front.output / "front.png", rows, title)
    return {**machine, "rows": rows, "output": str(front.output)}
