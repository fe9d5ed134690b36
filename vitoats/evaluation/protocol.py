"""Which labelled images a model is tested on, and how they are counted, in the terms of timm's validate.py."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from vitoats.common import ranks
from vitoats.common.errors import InputError
from vitoats.common.noted import note
from vitoats.data.images import SAMPLE, digest, given_batches, stream_batches
from vitoats.data.labelled import StreamedImages, open_labelled, read_valid_labels, with_classes_of_model, with_real_labels
from vitoats.data.transforms import Preprocessing
from vitoats.evaluation.accuracy import Accuracy, evaluate
from vitoats.evaluation.distributed import share, total
from vitoats.evaluation.target import Target


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How top-1 and top-5 are measured.

    Attributes:
        images: as ``data.labelled.open_labelled`` takes it, or a dataset of (image [3, h, w], label); None uses the embedded
            sample, with the embedded model only.
        dataset: timm's name of a data set, "" for ``images`` itself.
        split: validation, train, or the name of a folder in ``images``.
        num_samples: how many images, evenly spaced; None uses all.
        class_map: a text file with one class name on each line, in the model's order.
        real_labels: real.json of "Are we done with ImageNet?".
        valid_labels: a file that lists the outputs that count, for images of some classes only.
        batch_size: images at a time.
        workers: processes that read images.
    """

    images: Any = None
    dataset: str = ""
    split: str = "validation"
    num_samples: int | None = None
    class_map: Path | None = None
    real_labels: Path | None = None
    valid_labels: Path | None = None
    batch_size: int = 64
    workers: int = 0


@dataclass(frozen=True)
class TestSet:
    """Images ready to be evaluated.

    Attributes:
        batches: (images [b, 3, h, w], labels) of this process.
        n_images: number of images over all processes, unreadable ones included; 0 for a stream, whose length is unknown.
        n_classes: how many classes the labels come from; None if that does not matter.
        valid_labels: the outputs that count, None for all.
    """

    batches: Iterable[tuple[Tensor, Tensor]]
    n_images: int
    n_classes: int | None
    valid_labels: list[int] | None

    def evaluate(self, target: Target, progress: Callable[[Accuracy], None]) -> Accuracy:
        """Top-1 and top-5 over all processes.

        Raises:
            InputError: there are no images or no labels, or the model has no output for a label.
        """
        return evaluate(target.predict, self.batches, self.n_classes, progress, self.valid_labels, total)


def open_test_set(protocol: Protocol, target: Target, preprocessing: Preprocessing) -> TestSet:
    """Opens the images that a protocol names.

    Args:
        protocol: which images.
        target: the model that will see them.
        preprocessing: their preprocessing.

    Raises:
        InputError: there are no such images, or they do not suit the model.
    """
    images = SAMPLE if protocol.images is None and not protocol.dataset and target.embedded else protocol.images
    valid_labels = None if protocol.valid_labels is None else read_valid_labels(protocol.valid_labels)
    dataset: Any = images
    if images is None or isinstance(images, str):
        dataset = open_labelled(
            images,
            preprocessing.transform(),
            dataset=protocol.dataset,
            split=protocol.split,
            class_map=protocol.class_map,
            num_samples=protocol.num_samples,
        )
    if not (protocol.class_map or protocol.valid_labels):  # these define the classes themselves
        dataset = with_classes_of_model(dataset, target.classes)
    n_classes = len(dataset.classes) or None
    if isinstance(dataset, StreamedImages):
        if ranks.size() > 1 or protocol.real_labels:
            raise InputError(f"{protocol.dataset} is a stream without an index: use one process, and leave `real_labels` out")
        return TestSet(stream_batches(dataset, protocol.batch_size, protocol.workers), 0, n_classes, valid_labels)
    order, labelled = list(range(len(dataset))), dataset
    if protocol.real_labels is not None:
        dataset, order = with_real_labels(dataset, protocol.real_labels)
        n_classes = None
    order = spread(order, protocol.num_samples)
    if hasattr(labelled, "content"):
        note(lambda: {"test images": digest(labelled, order)})
    batches = given_batches(dataset, share(order, protocol.batch_size), protocol.workers)
    return TestSet(batches, len(order), n_classes, valid_labels)


def spread(order: list[int], wanted: int | None) -> list[int]:
    """Picks ``wanted`` evenly spaced images, so that all classes of a sorted set are among them."""
    wanted = min(wanted or len(order), len(order))
    return [order[i * len(order) // wanted] for i in range(wanted)]
