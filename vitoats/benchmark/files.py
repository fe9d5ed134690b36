"""Times exported files in ONNX Runtime, in turns; the first file is the baseline."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vitoats.benchmark.timing import median_ms
from vitoats.common.errors import InputError
from vitoats.runtime.inference import image_shape, inference, session

TURN_SECONDS = 0.5  # that a file runs before the next one has its turn


@dataclass(frozen=True)
class FileTimes:
    """The latency of a file at one batch size.

    Attributes:
        file: path of the file.
        batch: batch size.
        threads: threads of ONNX Runtime.
        ms: median milliseconds per batch.
        speedup: speedup over the first file.
        native_nodes: number of layers that the native operator runs.
        file_mb: size of the file in megabytes.
    """

    file: str
    batch: int
    threads: int
    ms: float
    speedup: float
    native_nodes: int
    file_mb: float


def compare_files(
    files: Sequence[Path], batches: Sequence[int], threads: Sequence[int], turn_seconds: float = TURN_SECONDS
) -> list[FileTimes]:
    """Times files on noise images.

    Args:
        files: ONNX files with one input [b, ...] each, all of the same shape; the dense one first.
        batches: batch sizes.
        threads: numbers of CPU threads; 0 for all cores.
        turn_seconds: how long a file runs before the next one has its turn.

    Returns:
        rows, ordered by threads, then batch, then file.

    Raises:
        InputError: a file is missing or does not run, or the files take images of different shapes.
    """
    rows: list[FileTimes] = []
    for count in threads:
        opened = [session(file, count) for file in files]
        shapes = {image_shape(each) for each in opened}
        if len(shapes) > 1:
            raise InputError(f"the files take images of different shapes, {shapes}: export them with the same `img_size`")
        (shape,) = shapes
        for batch in batches:
            images = np.random.default_rng(0).standard_normal((batch, *shape), np.float32)
            times = median_ms([inference(each, images) for each in opened], turn_seconds=turn_seconds)
            rows += [
                FileTimes(
                    file=str(file),
                    batch=batch,
                    threads=count,
                    ms=round(ms, 3),
                    speedup=round(times[0] / ms, 3),
                    native_nodes=len(each.native_nodes),
                    file_mb=round(file.stat().st_size / 1e6, 2),
                )
                for file, each, ms in zip(files, opened, times, strict=True)
            ]
    return rows
