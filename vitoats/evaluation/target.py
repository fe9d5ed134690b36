"""The model to evaluate: a torch model or an ONNX file, behind one interface."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vitoats.common.errors import InputError
from vitoats.common.finite import finite_outputs
from vitoats.common.sizes import ImageSize
from vitoats.data.transforms import Preprocessing
from vitoats.evaluation.accuracy import Predict
from vitoats.evaluation.exported import FileBackbone, open_exported
from vitoats.format.layers import compressed_counts, parameter_count
from vitoats.loading.checkpoint import WEIGHTS
from vitoats.loading.head_files import HeadFile, fitting_head
from vitoats.loading.loaded import LoadedModel
from vitoats.loading.names import EMBEDDED
from vitoats.runtime.inference import stored_bytes


@dataclass(frozen=True)
class Target:
    """A model to evaluate.

    Attributes:
        predict: maps images [b, 3, h, w] to logits [b, n_classes].
        preprocessing: the model's preprocessing.
        param_count: kept parameters in millions (``vitoats.format.layers.parameter_count``); None if unknown.
        embedded: whether the embedded sample is its test set.
        compression: share of the block weights that was removed, nnz and rank_params (``format.layers.compressed_counts``);
            None for those that do not apply.
        file_mb: size of the file with its weights; None if it has no file of its own.
        classes: class names in the order of the outputs, if its head provides them.
    """

    predict: Predict
    preprocessing: Preprocessing
    param_count: float | None
    embedded: bool
    compression: dict[str, Any]
    file_mb: float | None
    classes: tuple[str, ...] = ()


def _compression(source: dict[str, Any]) -> dict[str, Any]:
    return {key: source.get(key) for key in ("compression", "nnz", "rank_params")}


def _megabytes(path: Path) -> float | None:
    return round(stored_bytes(path) / 1e6, 3) if path.is_file() else None


def torch_target(loaded: LoadedModel, device: str, amp_dtype: torch.dtype | None = None) -> Target:
    """A torch model on a device.

    Args:
        loaded: the model.
        device: where it runs.
        amp_dtype: run it under torch's autocast with this dtype.

    Raises:
        InputError: the model has no classifier.
    """
    if not loaded.n_classes:
        raise InputError(f"{loaded.name} has no classifier: give it one with `head`")
    model = loaded.model.to(device)
    folder = Path(loaded.name)

    def predict(images: torch.Tensor) -> torch.Tensor:
        kind = torch.device(device).type
        if amp_dtype is None:
            return model(images.to(device))
        with torch.autocast(kind, amp_dtype):
            logits = model(images.to(device))
        remedy = "use `amp_dtype='bfloat16'`" if amp_dtype == torch.float16 else "leave `amp` out"
        return finite_outputs(logits, f"logits under autocast to {str(amp_dtype).removeprefix('torch.')}", remedy)

    return Target(
        predict,
        loaded.preprocessing,
        round(parameter_count(model) / 1e6, 2),
        loaded.source == EMBEDDED,
        _compression(loaded.about | compressed_counts(model)),
        _megabytes(folder / WEIGHTS),
        loaded.classes,
    )


def onnx_target(path: str, threads: int, img_size: ImageSize | None = None, head: HeadFile | None = None) -> Target:
    """An ONNX file in ONNX Runtime; preprocessing comes from its metadata.

    Args:
        path: the file.
        threads: CPU threads; 0 for all cores.
        img_size: another image size than the usual one, for a file that takes several.
        head: a linear head for a file that gives tokens.

    Raises:
        InputError: the file cannot be run, has no vitoats metadata, does not take images of this size, or needs another head.
    """
    file = open_exported(path, threads, img_size)
    described, classes = file.described, tuple(file.described.get("classes", ()))
    predict: Predict
    if head is not None:
        if described.get("n_classes"):
            raise InputError(f"{path} has a classifier of its own: leave `head` out")
        predict, classes = _with_head(FileBackbone(file), head)
    elif not described.get("n_classes"):
        raise InputError(f"{path} gives features, not logits: give `head` a linear head, or export it with one")
    else:

        def predict(images: torch.Tensor) -> torch.Tensor:
            logits = next(iter(file.run(images).values()))
            if logits.shape != (len(images), described["n_classes"]):
                raise InputError(f"{path} does not give {described['n_classes']} logits for each image: export it again")
            return logits

    return Target(
        predict,
        file.preprocessing,
        described.get("param_count"),
        described.get("model") == EMBEDDED,
        _compression(described),
        _megabytes(Path(path)),
        classes,
    )


def _with_head(backbone: FileBackbone, head: HeadFile) -> tuple[Predict, tuple[str, ...]]:
    """The logits of a head on a file's tokens, and its classes."""
    source, size = backbone.file.described.get("model", ""), backbone.file.preprocessing.img_size
    chosen, info = fitting_head(head, backbone.width, backbone.check, source=source, img_size=size)

    def predict(images: torch.Tensor) -> torch.Tensor:
        return backbone.features(images, info.layers, info.patch_mean) @ chosen.weight.T + chosen.bias

    return predict, info.classes
