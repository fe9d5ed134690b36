"""How close a compressed model stays to its dense one: features before the classifier, and outputs of single layers."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vitoats.common import ranks
from vitoats.common.errors import InputError, RunError
from vitoats.common.finite import REMEDY, finite_outputs
from vitoats.data.images import batches
from vitoats.evaluation.accuracy import evaluate
from vitoats.format.layers import SparseLowRankLinear, compressed_layers
from vitoats.loading.loaded import LoadedModel
from vitoats.models.hooks import watch_inputs, watch_outputs
from vitoats.models.inputs import ModelInputs

LogitsAndFeatures = Callable[[Tensor], tuple[Tensor, Tensor]]  # images [b, 3, h, w] -> logits [b, n_classes], features [b, d]


@dataclass(frozen=True)
class Outcome:
    """A model's results on each of n labelled images.

    Attributes:
        features: float32 [n, d], the input of the classifier.
        hits1: bool [n], whether the label came first.
        hits5: bool [n], whether the label was among the first five.
    """

    features: np.ndarray
    hits1: np.ndarray
    hits5: np.ndarray


def logits_and_features(loaded: LoadedModel, device: str) -> LogitsAndFeatures:
    """A torch model's forward pass, which also returns the input of its classifier.

    Raises:
        InputError: the model has no classifier.
    """
    model: Any = loaded.model.to(device)
    classifier = model.head if model is not loaded.timm_model else model.get_classifier()
    if not loaded.n_classes or not isinstance(classifier, nn.Module):
        raise InputError(f"{loaded.name} has no classifier: give it one with `head`")

    @torch.inference_mode()
    def forward(images: Tensor) -> tuple[Tensor, Tensor]:
        features: list[Tensor] = []
        with watch_inputs({"": classifier}, lambda _name, x: features.append(x)):
            logits = model(images.to(device))
        return logits.cpu(), features[0].float().cpu()

    return forward


def outcome(
    forward: LogitsAndFeatures,
    batches: Iterator[tuple[Tensor, Tensor]],
    n_classes: int | None,
    progress: Callable[[int], None] = lambda _: None,
) -> Outcome:
    """Runs a model over labelled images.

    Raises:
        InputError, RunError: as for ``evaluate``; RunError also if a feature is not finite.
    """
    features: list[Tensor] = []

    def predict(images: Tensor) -> Tensor:
        logits, found = forward(images)
        features.append(finite_outputs(found, "features"))
        return logits

    counted = evaluate(predict, batches, n_classes, lambda counts: progress(counts.n_images))
    return Outcome(torch.cat(features).numpy(), np.array(counted.hits1), np.array(counted.hits5))


def stacked_features(forward: LogitsAndFeatures, batches: Iterator[tuple[Tensor, Tensor]]) -> np.ndarray:
    """Features [n * k, d] of n images with k crops each, from batches of [b, k, 3, h, w].

    Raises:
        RunError: a feature is not finite.
    """
    return torch.cat([finite_outputs(forward(crops.flatten(0, 1))[1], "features") for crops, _ in batches]).numpy()


def cosines(features: np.ndarray, dense: np.ndarray) -> np.ndarray:
    """The cosine between both models' features [n, d] for each image, [n]."""
    lengths = np.linalg.norm(features, axis=1) * np.linalg.norm(dense, axis=1)
    return (features * dense).sum(axis=1) / np.maximum(lengths, np.finfo(np.float32).tiny)


def relative_error(features: np.ndarray, dense: np.ndarray) -> float:
    """||f - f_dense||^2 / ||f_dense - mean||^2 over all images: 1 is as bad as using the mean feature for every image.

    Raises:
        InputError: the dense features of all images are the same, so that the error has no scale.
        RunError: a feature is not finite.
    """
    dense = dense.astype(np.float64)
    if not (np.isfinite(features).all() and np.isfinite(dense).all()):
        raise RunError(f"features are not finite (NaN or Inf): {REMEDY}")
    scale = np.square(dense - dense.mean(axis=0)).sum()
    if scale == 0:
        raise InputError("the features of all images are the same: give `images` other ones")
    return float(np.square(features - dense).sum() / scale)


class Fidelity:
    """How much a backbone's features change over time, on named sets of images, which several processes share out."""

    def __init__(self, model: Any, inputs: ModelInputs, datasets: dict[str, Any], batch_size: int, workers: int):
        """Records the current features.

        Raises:
            RunError: a feature is not finite.
        """
        self.inputs = inputs
        self.datasets, self.batch_size, self.workers = datasets, batch_size, workers
        features = self._features(model)
        self.before = {name: f for name, f in features.items() if len(f) and (f != f[0]).any()}  # else the error has no scale

    def errors(self, model: Any) -> dict[str, float]:
        """The relative error of the features now, for each set with at least two different images.

        Raises:
            RunError: a feature is not finite.
        """
        now = self._features(model)
        return {name: relative_error(now[name], before) for name, before in self.before.items()}

    @torch.inference_mode()
    def _features(self, model: Any) -> dict[str, np.ndarray]:
        return {name: self._features_of(dataset, name, model).numpy() for name, dataset in self.datasets.items()}

    def _features_of(self, dataset: Any, name: str, model: Any) -> Tensor:
        """The features [n, d] of a set's images, those of the first process first."""
        device = next(model.parameters()).device

        def measured(rank: int) -> Tensor:
            parts = [torch.empty(0, 0)]
            for images, _ in batches(dataset, range(rank, len(dataset), ranks.size()), self.batch_size, self.workers):
                features = finite_outputs(self.inputs.features(model, images.to(device)), f"features of {name} images")
                parts.append(features.float().cpu())
            return torch.cat(parts[1:] or parts)

        processes = range(ranks.size())
        shares = ranks.shared_out(processes, [1.0] * len(processes), measured, lambda x: ({"x": x}, None), lambda x, _: x["x"])
        return torch.cat([share for share in shares if len(share)] or [torch.empty(0, 0)])


@torch.inference_mode()
def layer_error(dense: nn.Module, compressed: nn.Module, batches: Iterator[Tensor]) -> float | None:
    """Mean over layers of ||y' - y||^2 / ||y - b||^2, None if no layer was replaced by a sparse + low-rank one in float32.

    (Inputs of int8 layers are scaled, channel by channel: the dense layers do not fit them.)

    x is the layer's input in the compressed model; y' is the layer's output and y that of the dense layer, of bias b, for x.
    Layers whose y is always b are left out.

    Args:
        dense: the model before.
        compressed: the model after.
        batches: images [b, 3, h, w].
    """
    layers = {name: layer for name, layer in compressed_layers(compressed).items() if isinstance(layer, SparseLowRankLinear)}
    sums = {name: torch.zeros(2, dtype=torch.float64) for name in layers}

    def measure(name: str, x: Tensor, y: Tensor) -> None:
        before: Any = dense.get_submodule(name)
        exact = before(x)
        size = exact if before.bias is None else exact - before.bias
        sums[name] += torch.stack([(y - exact).square().sum(), size.square().sum()]).cpu()

    device = next(compressed.parameters()).device
    with watch_outputs(layers, measure):
        for images in batches:
            compressed(images.to(device))
    errors = [(error / size).item() for error, size in sums.values() if size != 0]
    return float(np.mean(errors)) if errors else None
