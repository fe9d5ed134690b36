"""Times whole models in ONNX Runtime (dense, int8, compressed in several forms) and the dense ones in OpenVINO if installed.

int8 is ONNX Runtime's dynamic quantization of all MatMuls, per channel; native-int8 and those that end in -int8 have our int8
operators. The caller compresses the models.
"""

import itertools
import json
import logging
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vitoats.benchmark import openvino_files
from vitoats.benchmark.timing import median_ms
from vitoats.common.progress import StageProgress
from vitoats.common.sizes import ImageSize
from vitoats.export.int8 import quantize
from vitoats.export.onnx_file import export_onnx
from vitoats.loading.loaded import LoadedModel
from vitoats.models.inputs import ImageInputs
from vitoats.runtime.inference import inference, session

TURN_SECONDS = 0.5  # that a variant runs before the next one has its turn
DENSE, INT8 = "dense", "int8"  # the variants that all others are compared with
N_IMAGES = 4  # noise images that NNCF takes its scales from: speed does not depend on them

log = logging.getLogger("vitoats")


@dataclass(frozen=True)
class Variant:
    """A file and the runtime that runs it.

    Attributes:
        name: name of the variant in tables.
        file: an ONNX file, or one in OpenVINO's format.
        openvino: precision of the arithmetic in OpenVINO, "f32" or "bf16"; None for ONNX Runtime.
    """

    name: str
    file: Path
    openvino: str | None = None

    @property
    def megabytes(self) -> float:
        """Size of the file, with the weights that OpenVINO's format keeps in a second one."""
        weights = self.file.with_suffix(".bin")
        return (self.file.stat().st_size + (weights.stat().st_size if self.file.suffix == ".xml" else 0)) / 1e6

    def open(self, threads: int, images: np.ndarray) -> Callable[[], object]:
        """A function that runs the file on images [b, 3, h, w]."""
        if self.openvino is None:
            return inference(session(self.file, threads), images)
        return openvino_files.open_file(self.file, self.openvino, threads, images)

    def resident_mb(self, threads: int, shape: tuple[int, ...]) -> float:
        """Resident memory of a fresh process, in megabytes, after it has run the file on a batch of this shape."""
        argv = [sys.executable, "-m", "vitoats.benchmark.resident", str(self.file), str(threads), json.dumps(shape)]
        argv += [] if self.openvino is None else [self.openvino]
        return int(subprocess.run(argv, capture_output=True, text=True, check=True).stdout) / 1e6


@dataclass(frozen=True)
class VariantTimes:
    """The latency of a variant at one batch size.

    Attributes:
        img_size: image size in pixels, (height, width) if they differ.
        batch: batch size.
        threads: threads of the runtime.
        variant: name of the variant.
        ms: median milliseconds per batch.
        speedup: speedup over ``dense``.
        speedup_int8: speedup over ``int8``.
        file_mb: size of the file in megabytes.
        rss_mb: resident memory, in megabytes, of a process that runs the file.
    """

    img_size: ImageSize
    batch: int
    threads: int
    variant: str
    ms: float
    speedup: float
    speedup_int8: float
    file_mb: float
    rss_mb: float


def dense_variants(loaded: LoadedModel, folder: Path) -> list[Variant]:
    """Exports a dense model to ``folder``: as it is, quantized by ONNX Runtime, and in int8 with our operators."""
    dense, int8, native = (Variant(name, folder / f"{name}.onnx") for name in (DENSE, INT8, "native-int8"))
    export_onnx(loaded, dense.file)
    quantize(dense.file, int8.file)
    export_onnx(loaded, native.file, int8=True)
    return [dense, int8, native]


def compressed_variants(compressed: LoadedModel, for_int8: LoadedModel, name: str, folder: Path, folded: bool) -> list[Variant]:
    """Exports a compressed model to ``folder``.

    Args:
        compressed: the model.
        for_int8: the model that is rounded to int8: the same one, or one with another share of low rank.
        name: first part of the variants' names.
        folder: folder for the files.
        folded: also export S + U V as dense matrices, where zeros save nothing.
    """
    forms = ("", "-float16", "-int8", "-folded")
    sparse, half, int8, plain = (Variant(f"{name}{form}", folder / f"{name}{form}.onnx") for form in forms)
    export_onnx(compressed, sparse.file)
    export_onnx(compressed, half.file, float16=True)
    export_onnx(for_int8, int8.file, int8=True)
    if not folded:
        return [sparse, half, int8]
    export_onnx(compressed, plain.file, "dense")
    return [sparse, half, int8, plain]


def openvino_variants(loaded: LoadedModel, dense: Variant, seed: int, folder: Path) -> list[Variant]:
    """The dense file in OpenVINO, and an int8 version of it made by NNCF; none without these packages.

    Args:
        loaded: the dense model.
        dense: its file.
        seed: seed of the noise images that NNCF takes the scales of activations from.
        folder: folder for the int8 file.
    """
    if not openvino_files.installed("openvino"):
        return []
    found = [Variant(f"openvino-{precision}", dense.file, precision) for precision in ("f32", "bf16")]
    if not openvino_files.installed("nncf"):
        log.warning("OpenVINO runs without int8, as the package nncf is missing: install vitoats[openvino]")
        return found
    int8 = folder / "openvino-int8.xml"
    openvino_files.quantize(dense.file, int8, [image[None].numpy() for image in loaded.inputs.noise(N_IMAGES, seed)])
    return [*found, Variant("openvino-int8", int8, "f32"), Variant("openvino-int8-bf16", int8, "bf16")]


def compare_variants(
    variants: Sequence[Variant],
    inputs: ImageInputs,
    batches: Sequence[int],
    threads: Sequence[int],
    seed: int = 0,
    progress: StageProgress = lambda *_: None,
) -> list[VariantTimes]:
    """Times variants of a model in turns, on noise images.

    Args:
        variants: the variants; ``dense`` and ``int8`` are among them.
        inputs: the inputs of all variants.
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
        images = np.random.default_rng(seed).standard_normal(inputs.shape(batch), np.float32)
        times = median_ms([variant.open(count, images) for variant in variants], turn_seconds=TURN_SECONDS)
        of = dict(zip([variant.name for variant in variants], times, strict=True))
        for variant, ms in zip(variants, times, strict=True):
            rows.append(
                VariantTimes(
                    img_size=inputs.img_size,
                    batch=batch,
                    threads=count,
                    variant=variant.name,
                    ms=round(ms, 3),
                    speedup=round(of[DENSE] / ms, 3),
                    speedup_int8=round(of[INT8] / ms, 3),
                    file_mb=round(variant.megabytes, 2),
                    rss_mb=round(variant.resident_mb(count, images.shape), 1),
                )
            )
    return rows
