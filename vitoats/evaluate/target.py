"""What is evaluated: a torch model or an ONNX file, behind one face."""

from dataclasses import dataclass

import numpy as np
import torch

from vitoats.data.transforms import Preprocessing
from vitoats.errors import InputError
from vitoats.evaluate.accuracy import Predict
from vitoats.layers import parameter_count
from vitoats.models.loading import LoadedModel
from vitoats.models.names import EMBEDDED
from vitoats.runtime.inference import metadata, session


@dataclass(frozen=True)
class Target:
    """A model to evaluate.

    Attributes:
        predict: images [b, 3, h, w] to logits [b, n_classes].
        preprocessing: its own.
        param_count: kept parameters in millions (``vitoats.layers.parameter_count``), None where unknown.
        embedded: whether the embedded sample is its test set.
    """

    predict: Predict
    preprocessing: Preprocessing
    param_count: float | None
    embedded: bool


def torch_target(loaded: LoadedModel, device: str) -> Target:
    """A torch model on a device.

    Raises:
        InputError: it has no classifier.
    """
    if not loaded.n_classes:
        raise InputError(f"{loaded.name} has no classifier: give it one with --head FILE")
    model = loaded.model.to(device)
    return Target(
        lambda images: model(images.to(device)),
        loaded.preprocessing,
        round(parameter_count(model) / 1e6, 2),
        loaded.about.get("model", loaded.name) == EMBEDDED,
    )


def onnx_target(path: str, crop_mode: str | None, threads: int) -> Target:
    """An ONNX file in ONNX Runtime; preprocessing comes from its metadata.

    Raises:
        InputError: it cannot be run, or has no vitoats metadata.
    """
    opened = session(path, threads)
    try:
        described = metadata(opened)
        preprocessing = Preprocessing.from_dict(described["preprocessing"])
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path} does not say how its images are preprocessed: export it with tools/export_onnx.py") from None
    if not described.get("n_classes"):
        raise InputError(f"{path} gives features, not logits: export it with a classifier (--head)")
    if crop_mode is not None:
        preprocessing = preprocessing.with_crop_mode(crop_mode)
    name = opened.get_inputs()[0].name

    def predict(images: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(np.asarray(opened.run(None, {name: images.numpy()})[0]))

    return Target(predict, preprocessing, described.get("param_count"), described.get("model") == EMBEDDED)
