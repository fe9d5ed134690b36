"""Top-1 and top-5 accuracy of anything that turns a batch of images into logits."""

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vitoats.errors import InputError

log = logging.getLogger("vitoats")

Predict = Callable[[Tensor], Tensor]  # images [b, 3, h, w] -> logits [b, n_classes]


@dataclass
class Accuracy:
    """Counts of an evaluation; percentages run 0 to 100.

    Attributes:
        hits1: for each image, whether its label came first.
        hits5: whether it was among the first five (or all, where there are fewer classes).
        predictions: the class in first place, for each image.
        seconds: in the model alone.
    """

    hits1: list[bool] = field(default_factory=list)
    hits5: list[bool] = field(default_factory=list)
    predictions: list[int] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def n_images(self) -> int:
        return len(self.hits1)

    @property
    def correct1(self) -> int:
        return sum(self.hits1)

    @property
    def correct5(self) -> int:
        return sum(self.hits5)

    @property
    def top1(self) -> float:
        return 100 * self.correct1 / self.n_images

    @property
    def top5(self) -> float:
        return 100 * self.correct5 / self.n_images


@torch.inference_mode()
def evaluate(
    predict: Predict,
    batches: Iterator[tuple[Tensor, Tensor]],
    n_classes: int | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> Accuracy:
    """Runs a model over labelled images.

    Args:
        predict: images to logits.
        batches: (images [b, 3, h, w], labels [b]).
        n_classes: how many classes the labels come from, to check against the logits.
        progress: told how many images are done.

    Raises:
        InputError: no images, no labels, or labels the model has no outputs for.
    """
    result = Accuracy()
    for images, labels in batches:
        if (labels < 0).any():
            raise InputError("these images have no labels: evaluation needs a folder with one subfolder for each class")
        start = time.perf_counter()
        logits = predict(images).cpu()
        result.seconds += time.perf_counter() - start
        if result.n_images == 0:
            _check_classes(logits, n_classes)
        ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices
        hits = ranked == labels[:, None]
        result.hits1 += hits[:, 0].tolist()
        result.hits5 += hits.any(dim=1).tolist()
        result.predictions += ranked[:, 0].tolist()
        progress(result.n_images)
    if result.n_images == 0:
        raise InputError("there was no image to evaluate: give --data-dir a folder with readable images")
    return result


def _check_classes(logits: Tensor, n_classes: int | None) -> None:
    if logits.ndim != 2:
        raise InputError(
            f"the model gives an output of shape {list(logits.shape)}, not logits: give it a classifier with --head"
        )
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
