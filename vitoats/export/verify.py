"""Compares an exported file with the torch model that it came from."""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor

from vitoats.common.finite import finite_outputs
from vitoats.loading.loaded import LoadedModel
from vitoats.runtime.inference import Session

BATCHES = (1, 2, 7)


@dataclass
class Agreement:
    """How closely an exported file agrees with torch.

    Attributes:
        relative_error: largest difference of an output over the largest output, on noise images at batch 1, 2 and 7, and at
            several sizes if the size is free.
        n_images: number of real images compared.
        logit_error: largest difference of a logit, or of a feature, on them.
        differing: (index, margin) of each image that is classified differently: its index in the data, and torch's largest
            logit minus the second largest. A margin below twice ``logit_error`` is a tie that rounding may break.
    """

    relative_error: float = 0.0
    n_images: int = 0
    logit_error: float = 0.0
    differing: list[tuple[int, float]] = field(default_factory=list)


@torch.inference_mode()
def verify(loaded: LoadedModel, exported: Session, images: Iterable[tuple[Tensor, Tensor]] = (), seed: int = 0) -> Agreement:
    """Compares outputs on noise images, and the predicted classes on real ones.

    Args:
        loaded: the torch model; without a classifier, only the outputs on ``images`` are compared.
        exported: the session of its exported file.
        images: batches of (images [b, 3, h, w], labels).
        seed: seed of the noise images.

    Raises:
        RunError: an output of the model or of the file is not finite.
    """
    agreement = Agreement()
    for inputs, batch in itertools.product(loaded.inputs.sizes, BATCHES):
        noise = inputs.noise(max(BATCHES), seed)[:batch]
        for found, expected in zip(_run(exported, noise), _torch(loaded, noise), strict=True):
            scale = expected.abs().max().clamp(min=torch.finfo(expected.dtype).tiny)
            agreement.relative_error = max(agreement.relative_error, float((found - expected).abs().max() / scale))
    for batch_of_images, _ in images:
        both = list(zip(_run(exported, batch_of_images), _torch(loaded, batch_of_images), strict=True))
        agreement.logit_error = max(agreement.logit_error, *(float((found - expected).abs().max()) for found, expected in both))
        if loaded.n_classes:
            ((found, expected),) = both
            for i in torch.nonzero(found.argmax(1) != expected.argmax(1)).ravel().tolist():  # none if there is one output
                first, second = expected[i].topk(2).values
                agreement.differing.append((agreement.n_images + i, float(first - second)))
        agreement.n_images += len(batch_of_images)
    return agreement


def _torch(loaded: LoadedModel, images: Tensor) -> list[Tensor]:
    outputs = loaded.model(images)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return [finite_outputs(output, "outputs of the torch model") for output in outputs]


def _run(exported: ort.InferenceSession, images: Tensor) -> list[Tensor]:
    outputs = exported.run(None, {exported.get_inputs()[0].name: images.numpy()})
    return [finite_outputs(torch.from_numpy(np.asarray(output)), "outputs of the exported file") for output in outputs]
