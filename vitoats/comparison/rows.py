"""The rows of a comparison: the dense model, ONNX Runtime's int8 version, and each compressed model, on the same images."""

import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor

from vitoats.common.errors import RunError
from vitoats.common.files import remove_beside
from vitoats.comparison.bench import Bench
from vitoats.comparison.plan import Run
from vitoats.compression.run import run as compress
from vitoats.evaluation import fidelity
from vitoats.evaluation.fidelity import LogitsAndFeatures, layer_error, logits_and_features
from vitoats.evaluation.paired import binomial_se, paired_difference
from vitoats.export.int8 import classifier_input, quantize, with_output
from vitoats.export.onnx_file import export_onnx
from vitoats.loading.checkpoint import save_checkpoint
from vitoats.models.flops import count_flops
from vitoats.runtime.inference import session

Row = tuple[dict[str, Any], dict[str, np.ndarray]]  # figures, and arrays with a value per image


def figures(bench: Bench, forward: LogitsAndFeatures, name: str, reference: Row | None) -> Row:
    """Evaluates a model on the test images against ``reference``, the dense model's row (None for the dense model itself)."""
    found = fidelity.outcome(
        forward,
        bench.images(),
        bench.n_classes,
        lambda done: bench.progress(f"evaluating {name}", done, bench.n_images, ""),
    )
    ood = None if bench.ood is None else fidelity.stacked_features(forward, bench.ood())
    arrays = {"features": found.features} | ({} if ood is None else {"ood_features": ood})
    dense = reference[1] if reference else {**arrays, "hits1": found.hits1}
    if len(dense["hits1"]) != len(found.hits1):
        raise RunError(f"{len(found.hits1)} test images could be read, not the {len(dense['hits1'])} of the dense model")
    difference, difference_se = paired_difference(100 * found.hits1.astype(float), 100 * dense["hits1"].astype(float))
    cosine = fidelity.cosines(found.features, dense["features"])
    row = {
        "n_images": len(found.hits1),
        "top1": 100 * float(found.hits1.mean()),
        "top1_se": binomial_se(found.hits1),
        "vs_dense": difference,
        "vs_dense_se": difference_se,
        "top5": 100 * float(found.hits5.mean()),
        "cosine": float(cosine.mean()),
        "relative_error": fidelity.relative_error(found.features, dense["features"]),
        "ood_cosine": None if ood is None else float(fidelity.cosines(ood, dense["ood_features"]).mean()),
        "ood_relative_error": None if ood is None else fidelity.relative_error(ood, dense["ood_features"]),
    }
    kept = {} if reference else arrays  # only the dense model's features are needed again
    return row, {"hits1": found.hits1, "hits5": found.hits5, "cosine": cosine, **kept}


def dense_row(bench: Bench, output: Path, _reference: Row | None) -> Row:
    """The row of the model before compression."""
    row, arrays = figures(bench, logits_and_features(bench.dense, bench.device), "dense", None)
    folder = output / "models" / "dense"
    save_checkpoint(bench.dense, folder, {"method": "dense"}, overwrite=True)
    row |= {
        **described("dense"),
        "bytes": weight_bytes(folder),
        "flops": count_flops(bench.dense.model, bench.dense.inputs),
    }
    _remove(folder)
    return row, arrays


def int8_row(bench: Bench, output: Path, reference: Row | None) -> Row:
    """The row of the dense model after ONNX Runtime's dynamic quantization, the usual alternative for deployment."""
    assert reference is not None
    folder = output / "models" / "int8"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        start = time.perf_counter()
        dense, int8, both = (folder / f"{name}.onnx" for name in ("dense", "int8", "both_outputs"))
        name = classifier_input(export_onnx(bench.dense, dense))
        quantize(dense, int8)
        seconds = time.perf_counter() - start
        onnx.save(with_output(onnx.load(str(int8)), name), str(both))
        opened = session(both, bench.threads)

        def forward(images: Tensor) -> tuple[Tensor, Tensor]:
            logits, features = opened.run(None, {opened.get_inputs()[0].name: images.numpy()})
            return torch.from_numpy(np.asarray(logits)), torch.from_numpy(np.asarray(features))

        row, arrays = figures(bench, forward, "int8", reference)
        size = int8.stat().st_size
    finally:
        _remove(folder)
    return row | {**described("int8", seconds=seconds), "bytes": size, "flops": reference[0]["flops"]}, arrays


def compressed_row(bench: Bench, run: Run, output: Path, keep: bool, reference: Row | None) -> Row:
    """The row of a compressed model; ``keep`` keeps its folder in ``output``."""
    folder = output / "models" / run.name
    try:
        compressed = compress(
            run.job,
            scratch=folder.parent,
            partial_folder=partial_folder(output, run.name),
            resume=True,
            progress=bench.progress,
        )
        loaded = compressed.vision_model
        row, arrays = figures(bench, logits_and_features(loaded, bench.device), run.name, reference)
        compressed.save(folder, overwrite=True)
        row |= {
            **described(
                run.label, compressed.report.compression, compressed.about["config"].get("pattern"), compressed.report.seconds
            ),
            "target": run.compression,
            "asked_pattern": run.pattern,
            "layer_error": layer_error(bench.dense.timm_model, loaded.timm_model, bench.few_images()),
            "bytes": weight_bytes(folder),
            "flops": count_flops(loaded.model, loaded.inputs),
        }
    finally:
        if not keep:
            _remove(folder)
    return row, arrays


def partial_folder(output: Path, name: str) -> Path:
    """Where the finished blocks of a row's model are until the row is there."""
    return output / "models" / f"{name}.partial"


def remove_partial(output: Path, name: str) -> None:
    """Removes what a row has needed until it was there; ``output`` is locked."""
    remove_beside(output, partial_folder(output, name))
    _remove_if_empty(output / "models")


def described(
    method: str, compression: float = 0.0, pattern: str | None = None, seconds: float | None = None
) -> dict[str, Any]:
    """The columns that do not depend on the images."""
    return {
        "method": method,
        "compression": compression,
        "target": None,
        "pattern": pattern,
        "asked_pattern": None,
        "layer_error": None,
        "seconds": seconds,
    }


def weight_bytes(folder: Path) -> int:
    """Bytes of the weights in a folder written by compress: values, bit masks, U, V, everything that stays dense, the head."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _remove(folder: Path) -> None:
    """Removes a model's folder, and its parent folder if that is then empty."""
    shutil.rmtree(folder, ignore_errors=True)
    _remove_if_empty(folder.parent)


def _remove_if_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
