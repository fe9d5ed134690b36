"""Images for calibration and evaluation: a folder, the files of Fashion-MNIST, or the sample embedded in the package."""

import gzip
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import vitoats.common.torchvision_ops  # noqa: F401  (before timm and torchvision)
from vitoats.common.errors import InputError
from vitoats.data.folders import find_images

from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset  # isort: skip
from timm.utils.misc import natural_key  # isort: skip
from torchvision.datasets.folder import IMG_EXTENSIONS  # isort: skip

log = logging.getLogger("vitoats")

SAMPLE = "sample"  # names the embedded sample where a folder is expected
SAMPLE_FILE = Path(__file__).parent / "fashion_mnist_sample.npz"
FASHION_MNIST_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
SPLIT_FOLDERS = {"train": ("train",), "test": ("val", "validation", "valid", "eval", "evaluation", "test")}
IDX_FILES = {"train": "train", "test": "t10k"}
FEWEST_IMAGES = 16  # minimum for a calibration set that is smaller than requested
NAMED_FILES = 3  # number of ignored files that a warning names


@dataclass(frozen=True)
class Unreadable:
    """Takes an image's place in a batch when its file cannot be decoded."""

    path: str
    reason: str


class ImageFiles(Dataset):
    """Image files with optional labels; an item is (image tensor, label) or ``Unreadable``."""

    def __init__(self, paths: list[str], labels: list[int] | None, classes: tuple[str, ...], transform: Callable):
        self.paths, self.labels, self.classes, self.transform = paths, labels, classes, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int] | Unreadable:
        path = self.paths[index]
        try:
            with Image.open(path) as image:
                return self.transform(image), self.labels[index] if self.labels else -1
        except Exception as error:  # PIL's decoders raise all kinds of errors on a broken file
            return Unreadable(path, str(error) or type(error).__name__)

    def content(self, index: int) -> bytes:
        """The file's bytes; empty if it cannot be read, in which case the image is skipped anyway."""
        try:
            return Path(self.paths[index]).read_bytes()
        except OSError:
            return b""


class ImageArrays(Dataset):
    """Greyscale images in memory, uint8 [n, height, width]; an item is (image tensor, label)."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, classes: tuple[str, ...], transform: Callable):
        self.images, self.labels, self.classes, self.transform = images, labels, classes, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), int(self.labels[index])

    def content(self, index: int) -> bytes:
        """The image's bytes."""
        return self.images[index].tobytes()


ImageDataset = ImageFiles | ImageArrays


def open_images(data_dir: str, split: str, transform: Callable, field: str = "images") -> ImageDataset:
    """Opens a set of images.

    Args:
        data_dir: "sample"; a folder with one subfolder per class; a flat folder of images; a folder that contains ``train``
            and ``val``; or a folder with the gz files of (Fashion-)MNIST.
        split: "train" for calibration, "test" for evaluation; ignored for sets without splits.
        transform: converts a PIL image of any kind to a tensor.
        field: the argument that names the images, for error messages.

    Raises:
        InputError: the folder does not exist or contains no images.
    """
    if data_dir == SAMPLE:
        with np.load(SAMPLE_FILE, allow_pickle=False) as sample:
            return ImageArrays(sample[f"{split}_images"], sample[f"{split}_labels"], FASHION_MNIST_CLASSES, transform)
    root = Path(data_dir)
    if not root.is_dir():
        raise InputError(
            f"there is no image folder {data_dir}: give `{field}` a folder of images, or one folder for each class"
        )
    prefix = IDX_FILES[split]
    if (root / f"{prefix}-images-idx3-ubyte.gz").is_file():
        images = read_idx(root / f"{prefix}-images-idx3-ubyte.gz", header=16, shape=(28, 28))
        targets = read_idx(root / f"{prefix}-labels-idx1-ubyte.gz", header=8)
        if len(images) != len(targets):
            raise InputError(f"{root} has {len(images)} {prefix} images and {len(targets)} labels: copy the data set again")
        return ImageArrays(images, targets, FASHION_MNIST_CLASSES, transform)
    for name in SPLIT_FOLDERS[split]:
        if (root / name).is_dir():
            _warn_of_neighbours(root, name)
            return image_folder(root / name, transform, field)
    return image_folder(root, transform, field)


def _warn_of_neighbours(root: Path, split: str) -> None:
    """Warns if a folder that is taken for a split has neighbours that are no other splits: it may be a class of that name."""
    splits = {name for names in SPLIT_FOLDERS.values() for name in names}
    with os.scandir(root) as entries:
        others = [
            entry.name
            for entry in entries
            if entry.name.lower().endswith(IMG_EXTENSIONS)
            or (entry.is_dir() and entry.name not in splits and not entry.name.startswith("."))
        ]
    if others:
        others.sort(key=natural_key)
        log.warning("in %s only the folder %s is read; left out beside it: %d (%s)", root, split, len(others), _some(others))


def image_folder(root: Path, transform: Callable, field: str = "images") -> ImageFiles:
    """Opens a flat folder of images, or a folder with one subfolder per class.

    Raises:
        InputError: the folder contains no images.
    """
    found = find_images(root)
    for what, paths in (
        ("files left out in %s, no images by their name", found.others),
        ("links or folders left out in %s that lead nowhere or cannot be read", found.unreachable),
        ("images left out in %s, since they lie beside its class folders and are of no class", found.loose),
        ("links left out in %s, whose files are counted already", found.again),
        ("folders in %s without images, which are no classes", found.empty if found.classes else []),
    ):
        if paths:
            log.warning(f"{what}: %d (%s)", root, len(paths), _some(paths))
    if not found.paths:
        raise InputError(f"there are no images in {root}: give `{field}` a folder with .jpg, .png or other image files")
    return ImageFiles(found.paths, found.labels if found.classes else None, found.classes, transform)


def digest(dataset: ImageDataset, indices: Iterable[int]) -> str:
    """A digest of the images at ``indices``, in that order: their bytes on disk or in memory, labels and class names.

    File paths and all other images have no influence on it.
    """
    indices = list(indices)
    labels = [] if dataset.labels is None else [int(dataset.labels[i]) for i in indices]
    found = hashlib.sha256(json.dumps([dataset.classes, labels]).encode())
    for i in indices:
        found.update(hashlib.sha256(dataset.content(i)).digest())
    return found.hexdigest()


def shuffled(dataset: Any, seed: int) -> list[int]:
    """The indices of all images in random order, the order in which they are drawn."""
    return torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()


def read_idx(path: Path, header: int, shape: tuple[int, ...] = ()) -> np.ndarray:
    """Reads the content of a gzipped IDX file after its header, as uint8 [n, *shape].

    Raises:
        InputError: the file is missing or damaged.
    """
    try:
        with gzip.open(path) as file:
            return np.frombuffer(file.read(), np.uint8, offset=header).reshape(-1, *shape)
    except (OSError, EOFError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}): install or copy the data set again") from None


def _some(names: list[str]) -> str:
    more = f" and {len(names) - NAMED_FILES} more" if len(names) > NAMED_FILES else ""
    return ", ".join(names[:NAMED_FILES]) + more


def _collate(items: list) -> tuple[Tensor, Tensor, list[Unreadable]]:
    good = [i for i in items if not isinstance(i, Unreadable)]
    images = torch.stack([image for image, _ in good]) if good else torch.empty(0)
    return images, torch.tensor([label for _, label in good]), [i for i in items if isinstance(i, Unreadable)]


def batches(dataset: Dataset, order: Iterable[int], batch_size: int, workers: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields (images [b, 3, h, w], labels [b]) in the given order; unreadable files are skipped, with a warning for each."""
    whole = BatchSampler(order, batch_size, drop_last=False)
    yield from given_batches(dataset, whole, workers)


def given_batches(dataset: Dataset, indices: Iterable[list[int]], workers: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Like ``batches``, but takes the indices of each batch."""
    yield from _readable(DataLoader(dataset, batch_sampler=indices, num_workers=workers, collate_fn=_collate))


def stream_batches(dataset: IterableDataset, batch_size: int, workers: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Like ``batches``, but for images in a fixed order; uses at most one worker, since several would change the order."""
    yield from _readable(DataLoader(dataset, batch_size=batch_size, num_workers=min(workers, 1), collate_fn=_collate))


def _readable(loader: DataLoader) -> Iterator[tuple[Tensor, Tensor]]:
    unreadable: list[Unreadable] = []
    try:
        for images, labels, bad in loader:
            for item in bad:
                log.warning("%s cannot be read as an image and is skipped: %s", item.path, item.reason)
            unreadable += bad
            if len(images):
                yield images, labels
    finally:
        if unreadable:
            log.warning("image files skipped: %d", len(unreadable))


def calibration_batches(dataset: ImageDataset, nsamples: int, seed: int, batch_size: int, workers: int) -> Iterator[Tensor]:
    """Yields ``nsamples`` randomly drawn images in batches; unreadable files are replaced by other images.

    If the folder has fewer images, all of them are used, with a warning.

    Raises:
        InputError: fewer than ``nsamples`` images can be read, and fewer than 16.
    """
    missing = nsamples
    for images, _ in batches(dataset, shuffled(dataset, seed), min(batch_size, nsamples), workers):
        yield images[:missing]
        missing -= min(missing, len(images))
        if missing == 0:
            return
    found = nsamples - missing
    if found < FEWEST_IMAGES:
        remedy = f"add images, or set `nsamples` {found}" if found else "add images"
        raise InputError(f"only {found} images can be read, too few to calibrate on: {remedy}")
    log.warning("calibrating on %d images, all that can be read, not on %d", found, nsamples)
