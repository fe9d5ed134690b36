"""Times whole models in ONNX Runtime (dense, int8, compressed in several forms) and the dense ones in OpenVINO if installed.

int8 is ONNX Runtime's dynamic quantization of all MatMuls, per channel. The caller compresses the models.
"""

import importlib.util
import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vitoats.benchmark.timing import median_ms
from vitoats.common.progress import StageProgress
from vitoats.export.int8 import quantize
from vitoats.export.onnx_file import export_onnx
from vitoats.loading.loaded import LoadedModel
from vitoats.runtime.inference import inference, session

TURN_SECONDS = 0.5  # that a variant runs before the next one has its turn


@dataclass(frozen=True)
class Variant:
    """A file and the runtime that runs it.

    Attributes:
        name: name of the variant in tables.
        file: the ONNX file.
        openvino: precision of the arithmetic in OpenVINO; None for ONNX Runtime.
    """

    name: str
    file: Path
    openvino: str | None = None

    def open(self, threads: int, images: np.ndarray) -> Callable[[], object]:
        """A function that runs the file on images [b, 3, h, w]."""
        if self.openvino is None:
            return inference(session(self.file, threads), images)
        import openvino

        settings = {"INFERENCE_PRECISION_HINT": self.openvino, "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
        request = openvino.compile_model(str(self.file), "CPU", settings).create_infer_request()
        return lambda: request.infer([images])


@dataclass(frozen=True)
class VariantTimes:
    """The latency of a variant at one batch size.

    Attributes:
        img_size: image size in pixels.
        batch: batch size.
        threads: threads of the runtime.
        variant: name of the variant.
        ms: median milliseconds per batch.
        speedup: speedup over the first variant.
        file_mb: size of the file in megabytes.
        rss_mb: resident memory, in megabytes, of a process that runs the file; None for OpenVINO.
    """

    img_size: int
    batch: int
    threads: int
    variant: str
    ms: float
    speedup: float
    file_mb: float
    rss_mb: float | None


def dense_variants(loaded: LoadedModel, folder: Path) -> list[Variant]:
    """Exports a dense model, as it is and in int8, to ``folder``."""
    dense, int8 = Variant("dense", folder / "dense.onnx"), Variant("int8", folder / "int8.onnx")
    export_onnx(loaded, dense.file)
    quantize(dense.file, int8.file)
    return [dense, int8]


def compressed_variants(compressed: LoadedModel, name: str, folder: Path, folded: bool) -> list[Variant]:
    """Exports a compressed model to ``folder``.

    Args:
        compressed: the model.
        name: first part of the variants' names.
        folder: folder for the files.
        folded: also export S + U V as dense matrices, where zeros save nothing.
    """
    sparse, half, plain = (Variant(f"{name}{form}", folder / f"{name}{form}.onnx") for form in ("", "-float16", "-folded"))
    export_onnx(compressed, sparse.file)
    export_onnx(compressed, half.file, float16=True)
    if not folded:
        return [sparse, half]
    export_onnx(compressed, plain.file, "dense")
    return [sparse, half, plain]


def openvino_variants(dense: Variant, int8: Variant) -> list[Variant]:
    """The same dense files in OpenVINO; empty if the package is not installed."""
    if not importlib.util.find_spec("openvino"):
        return []
    return [
        *(Variant(f"openvino-{precision}", dense.file, precision) for precision in ("f32", "bf16")),
        Variant("openvino-int8", int8.file, "f32"),
    ]


def compare_variants(
    variants: Sequence[Variant],
    img_size: int,
    batches: Sequence[int],
    threads: Sequence[int],
    seed: int = 0,
    progress: StageProgress = lambda *_: None,
) -> list[VariantTimes]:
    """Times variants of a model in turns, on noise images.

    Args:
        variants: the variants, the dense one first.
        img_size: image size of all variants, in pixels.
        batches: batch sizes.
        threads: numbers of CPU threads.
        seed: seed of the noise.
        progress: called before each batch size and number of threads.

    Returns:
        rows, ordered by threads, then batch, then variant.
    """
    rows = []
    groups = list(itertools.product(threads, batches))
    for done, (count, batch) in enumerate(groups):
        progress(done, len(groups), f"batch {batch}, {count} threads")
        images = np.random.default_rng(seed).standard_normal((batch, 3, img_size, img_size), np.float32)
        times = median_ms([variant.open(count, images) for variant in variants], turn_seconds=TURN_SECONDS)
        for variant, ms in zip(variants, times, strict=True):
            rows.append(
                VariantTimes(
                    img_size=img_size,
                    batch=batch,
                    threads=count,
                    variant=variant.name,
                    ms=round(ms, 3),
                    speedup=round(times[0] / ms, 3),
                    file_mb=round(variant.file.stat().st_size / 1e6, 2),
                    rss_mb=resident_mb(variant.file, count, images.shape) if variant.openvino is None else None,
                )
            )
    return rows


def resident_mb(file: Path, threads: int, shape: tuple[int, ...]) -> float:
    """Resident memory of a fresh process, in megabytes, after it has run a file on a batch of this shape."""
    argv = [sys.executable, "-m", "vitoats.benchmark.resident", str(file), str(threads), json.dumps(shape)]
    return int(subprocess.run(argv, capture_output=True, text=True, check=True).stdout) / 1e6
