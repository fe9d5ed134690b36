"""Top-1 and top-5 accuracy of anything that turns a batch of images into logits."""

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vitoats.common.errors import InputError
from vitoats.common.finite import finite_outputs

log = logging.getLogger("vitoats")

Predict = Callable[[Tensor], Tensor]  # images [b, 3, h, w] -> logits [b, n_classes]


@dataclass
class Accuracy:
    """Counts of an evaluation; percentages run from 0 to 100.

    Attributes:
        n_images: number of images evaluated.
        correct1: number of images whose label came first.
        correct5: number of images whose label was among the first five (or all, if there are fewer classes).
        hits1: for each image of this process, whether it counts in ``correct1``.
        hits5: the same for ``correct5``.
        predictions: the top class of each image.
        seconds: time spent in the model alone.
    """

    n_images: int = 0
    correct1: int = 0
    correct5: int = 0
    hits1: list[bool] = field(default_factory=list)
    hits5: list[bool] = field(default_factory=list)
    predictions: list[int] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def top1(self) -> float:
        return 100 * self.correct1 / self.n_images

    @property
    def top5(self) -> float:
        return 100 * self.correct5 / self.n_images


@torch.inference_mode()
def evaluate(
    predict: Predict,
    batches: Iterable[tuple[Tensor, Tensor]],
    n_classes: int | None = None,
    progress: Callable[[Accuracy], None] = lambda _: None,
    valid_labels: list[int] | None = None,
    total: Callable[[Accuracy], Accuracy] = lambda own: own,
) -> Accuracy:
    """Runs a model over labelled images.

    Args:
        predict: maps images to logits.
        batches: (images [b, 3, h, w], labels [b], or [b, m] if images have several correct labels, padded with -1).
        n_classes: how many classes the labels come from, to check against the logits.
        progress: called with the counts after each batch.
        valid_labels: the outputs that count: output ``valid_labels[i]`` stands for label i.
        total: adds up the counts if several processes share the images.

    Raises:
        InputError: there are no images or no labels, or the model has no output for a label.
        RunError: a logit is not finite.
    """
    result = Accuracy()
    for images, labels in batches:
        labels = labels.reshape(len(labels), -1)
        if (labels[:, 0] < 0).any():
            raise InputError("these images have no labels: evaluation needs a folder with one subfolder for each class")
        start = time.perf_counter()
        logits = predict(images).cpu()
        result.seconds += time.perf_counter() - start
        if logits.ndim != 2:
            raise InputError(
                f"the model gives an output of shape {list(logits.shape)}, not logits: give it a classifier with `head`"
            )
        if valid_labels is not None:
            logits = _chosen(logits, valid_labels)
        finite_outputs(logits, "logits")
        if result.n_images == 0:
            _check_classes(logits, n_classes)
        if labels.max() >= logits.shape[1]:
            raise InputError(
                f"an image has label {labels.max()}, but the model knows {logits.shape[1]} classes: use other images"
            )
        ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices  # [b, 5]
        hits = (ranked[:, :, None] == labels[:, None, :]).any(dim=2)
        result.n_images += len(labels)
        result.correct1 += int(hits[:, 0].sum())
        result.correct5 += int(hits.any(dim=1).sum())
        result.hits1 += hits[:, 0].tolist()
        result.hits5 += hits.any(dim=1).tolist()
        result.predictions += ranked[:, 0].tolist()
        progress(result)
    result = total(result)
    if result.n_images == 0:
        raise InputError("there was no image to evaluate: give `images` a folder with readable images")
    return result


def _chosen(logits: Tensor, valid_labels: list[int]) -> Tensor:
    wrong = next((i for i in valid_labels if not 0 <= i < logits.shape[1]), None)
    if wrong is not None or not valid_labels:
        raise InputError(f"`valid_labels` names {wrong or 'no'} output, the model has {logits.shape[1]}: give another file")
    return logits[:, valid_labels]


def _check_classes(logits: Tensor, n_classes: int | None) -> None:
    if n_classes is None or n_classes == logits.shape[1]:
        return
    if n_classes > logits.shape[1]:
        raise InputError(
            f"the images come in {n_classes} classes, but the model knows {logits.shape[1]}: use the images of its classes"
        )
    log.warning(
        "the images come in %d classes and the model knows %d: folder i is taken for class i",
        n_classes,
        logits.shape[1],
    )
