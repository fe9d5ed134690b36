"""Exported files in ONNX Runtime, timed in turns; the first is what the others are compared with."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vitoats.benchmark.timing import median_ms
from vitoats.common.errors import InputError
from vitoats.runtime.inference import inference, session

TURN_SECONDS = 0.5  # of each file before the next has its turn


@dataclass(frozen=True)
class FileTimes:
    """A file on batches of one size.

    Attributes:
        file: its path.
        batch: images at a time.
        threads: of ONNX Runtime.
        ms: median milliseconds of a batch.
        speedup: of the first file over this one.
        native_nodes: how many of its layers the native operator runs.
        file_mb: megabytes.
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
        files: ONNX files with one input [b, ...] each, of the same shape; the dense one first.
        batches: images at a time, one after the other.
        threads: CPU threads, one after the other; 0 takes all cores.
        turn_seconds: of each file before the next has its turn.

    Returns:
        rows by threads, then batch, then file.

    Raises:
        InputError: a file is not there or does not run, or their images differ in shape.
    """
    rows: list[FileTimes] = []
    for count in threads:
        opened = [session(file, count) for file in files]
        shapes = {tuple(each.get_inputs()[0].shape[1:]) for each in opened}
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
