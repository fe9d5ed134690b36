"""The common ground of a comparison: one dense model, and the same images for all methods."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vitoats
from vitoats.common.errors import InputError
from vitoats.common.fingerprint import tensors_sha256
from vitoats.common.noted import note
from vitoats.common.progress import Progress
from vitoats.compression.job import CompressionJob
from vitoats.compression.run import HELD_OUT
from vitoats.data.crops import Crops
from vitoats.data.images import ImageDataset, ImageFiles, batches, digest, log, open_images, shuffled
from vitoats.evaluation.fidelity import logits_and_features
from vitoats.loading.loaded import LoadedModel
from vitoats.loading.source import open_model

OOD_CROPS = 5  # random crops of each out-of-domain image, in addition to the model's own preprocessing
LAYER_IMAGES = 64  # test images that measure single layers


@dataclass(frozen=True)
class Bench:
    """What all rows share.

    Attributes:
        dense: the model before compression.
        device: device of the torch models.
        threads: threads of ONNX Runtime; 0 for all cores.
        images: opens the test images, batches of ([b, 3, h, w], labels [b]), in the same order each time.
        few_images: opens the first test images, without labels.
        n_images: number of test images, including unreadable files.
        n_classes: number of classes of the test set.
        ood: opens the out-of-domain images, batches of ([b, crops, 3, h, w], labels); None without such images.
        settings: everything that must be equal for rows to be comparable.
        progress: called with the progress of evaluations.
    """

    dense: LoadedModel
    device: str
    threads: int
    images: Callable[[], Iterator[tuple[Tensor, Tensor]]]
    few_images: Callable[[], Iterator[Tensor]]
    n_images: int
    n_classes: int
    ood: Callable[[], Iterator[tuple[Tensor, Tensor]]] | None
    settings: dict[str, Any]
    progress: Progress


def open_bench(job: CompressionJob, num_samples: int | None, ood_dir: Path | None, progress: Progress) -> Bench:
    """Loads the dense model and opens all images.

    Args:
        job: any job of the comparison; all have the same model, images and resources.
        num_samples: number of test images, the first of a seeded shuffle; None for all.
        ood_dir: folder of out-of-domain images.
        progress: called with the progress of evaluations.

    Raises:
        InputError: the model has no classifier, or the images are unsuitable for a comparison.
    """
    data, resources = job.image_data, job.resources
    dense = open_model(job.model)
    logits_and_features(dense, resources.device)  # refuses a model without a classifier before the work starts
    transform = dense.preprocessing.transform()
    calibration, test = (open_images(data.images, split, transform) for split in ("train", "test"))
    if not test.classes:
        raise InputError("these images have no labels: give `images` a folder with one subfolder for each class")
    if isinstance(calibration, ImageFiles) and isinstance(test, ImageFiles) and calibration.paths == test.paths:
        log.warning("calibration and test images are drawn from the same ones: better give a folder with train and val")
    drawn = shuffled(calibration, data.seed)[: data.nsamples + HELD_OUT]
    order = shuffled(test, data.seed)[:num_samples]
    if len(order) < 2:
        raise InputError("one test image cannot tell methods apart: raise `num_samples`, or add images")
    crops = Crops(dense.preprocessing, OOD_CROPS, data.seed)
    ood = None if ood_dir is None else open_images(str(ood_dir), "test", crops, field="ood_dir")
    note(lambda: {"test images": digest(test, order)})
    if ood is not None:
        note(lambda: {"out-of-domain images": digest(ood, range(len(ood)))})
    size, workers = resources.batch_size, resources.workers
    settings = {
        "model": job.model.name,
        "weights (sha256)": tensors_sha256(dense.model.state_dict()),
        "preprocessing": dense.preprocessing.to_dict(),
        "calibration images": _described(calibration, drawn),
        "test images": _described(test, order),
        "out-of-domain images": None if ood is None else _described(ood, range(len(ood))),
        "nsamples": data.nsamples,
        "num_samples": len(order),
        "seed": data.seed,
        "versions": {"vitoats": vitoats.__version__, "torch": torch.__version__},
    }
    return Bench(
        dense=dense,
        device=resources.device,
        threads=resources.threads,
        images=lambda: batches(test, order, size, workers),
        few_images=lambda: (images for images, _ in batches(test, order[:LAYER_IMAGES], size, 0)),
        n_images=len(order),
        n_classes=len(test.classes),
        ood=None if ood is None else lambda: batches(ood, list(range(len(ood))), max(1, size // 8), workers),
        settings=settings,
        progress=progress,
    )


def _described(dataset: ImageDataset, indices: Iterable[int]) -> str:
    return f"{len(dataset)} ({digest(dataset, indices)[:12]})"
