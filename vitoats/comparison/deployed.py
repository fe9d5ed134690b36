"""Compares exported files as they would be deployed: accuracy, file size, and latency in ONNX Runtime."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vitoats.benchmark.files import compare_files
from vitoats.common.progress import Progress
from vitoats.data.images import batches, open_images
from vitoats.evaluation.accuracy import evaluate
from vitoats.evaluation.target import onnx_target

TURN_SECONDS = 0.3  # that a file runs before the next one has its turn


def measure(
    files: Mapping[str, Path], images: str, batch_sizes: tuple[int, ...], threads: int, progress: Progress
) -> list[dict[str, Any]]:
    """Measures files in turns, so that other load on the machine affects them equally.

    Args:
        files: ONNX files by name, the baseline first; all take images of the same size.
        images: a labelled data set, as ``open_images`` takes it; its test images are classified.
        batch_sizes: batch sizes for the latency; that of the first is called ``latency_ms``, without a suffix.
        threads: CPU threads; 0 for all cores.
        progress: called with the progress of evaluations.

    Returns:
        a row per file: method, top1 (percent), n_images, img_size, onnx_mb, native_nodes, and for each batch size
        ``latency_ms`` and ``speedup`` over the first file.
    """
    rows = [{"method": name, **_accuracy(name, file, images, threads, progress)} for name, file in files.items()]
    for timed in compare_files(list(files.values()), batch_sizes, [threads], TURN_SECONDS):
        row = rows[[str(file) for file in files.values()].index(timed.file)]
        of_batch = "" if timed.batch == batch_sizes[0] else f"_batch{timed.batch}"
        row |= {f"latency_ms{of_batch}": round(timed.ms, 2), f"speedup{of_batch}": timed.speedup}
        row["native_nodes"] = timed.native_nodes
    return rows


def _accuracy(name: str, file: Path, images: str, threads: int, progress: Progress) -> dict[str, Any]:
    """Top-1 on the test images, and the file size."""
    target = onnx_target(str(file), threads)
    dataset = open_images(images, "test", target.preprocessing.transform())
    order = list(range(len(dataset)))
    result = evaluate(
        target.predict,
        batches(dataset, order, batch_size=50, workers=0),
        len(dataset.classes),
        lambda seen: progress(f"evaluating {name}", seen.n_images, len(order), ""),
    )
    return {
        "top1": round(result.top1, 2),
        "n_images": result.n_images,
        "img_size": target.preprocessing.img_size,
        "onnx_mb": round(file.stat().st_size / 1e6, 2),
    }
