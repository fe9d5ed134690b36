"""Labelled images for evaluation, named as in timm: a folder, a .tar file, or a data set of ``create_dataset``.

Images have timm's order and timm's labels. An unreadable file is skipped with a warning, whereas timm substitutes the next
image. Only ``hfds/``, ``hfids/``, ``tfds/`` and ``wds/`` may download anything, and a log message says so.
"""

import importlib.util
import itertools
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

import vitoats.common.torchvision_ops  # noqa: F401  (before timm)
from vitoats.common.errors import InputError, one_line
from vitoats.common.json_files import LARGEST, parse_json
from vitoats.common.whole_files import read_text
from vitoats.data.images import SAMPLE, ImageDataset, ImageFiles, Unreadable, image_folder, open_images

from timm.data import IterableImageDataset, create_dataset  # isort: skip
from timm.data.readers.reader_image_in_tar import ReaderImageInTar  # isort: skip
from torch.utils.data import Dataset, IterableDataset  # isort: skip

log = logging.getLogger("vitoats")

TRAIN_SPLITS = ("train", "training")
TEST_SPLITS = ("validation", "val", "valid", "eval", "evaluation", "test")
FETCHED = {"hfds": "datasets", "hfids": "datasets", "tfds": "tensorflow_datasets", "wds": "webdataset"}  # by package


class ReadImages(Dataset):
    """Images of a timm reader or a torchvision data set; an item is (image tensor, label) or ``Unreadable``."""

    def __init__(self, source: Any, names: list[str], classes: tuple[str, ...], transform: Callable, labelled: bool = True):
        self.source, self.paths, self.classes, self.transform = source, names, classes, transform
        self.labelled = labelled

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, int] | Unreadable:
        try:
            image, label = self.source[index]
            with image if isinstance(image, Image.Image) else Image.open(image) as opened:
                pixels = self.transform(opened)
            return pixels, int(label) if self.labelled and label is not None else -1
        except Exception as error:  # PIL's decoders raise all kinds of errors on a broken file
            name = self.paths[index] if self.paths else f"image {index}"
            return Unreadable(name, str(error) or type(error).__name__)


class StreamedImages(IterableDataset):
    """A stream of images of unknown length; an item is (image tensor, label)."""

    classes: tuple[str, ...] = ()

    def __init__(self, source: IterableDataset, length: int | None):
        self.source, self.length = source, length

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        return itertools.islice(self.source, self.length)


class Relabelled(Dataset):
    """Images with several correct labels each, in rows padded to equal length with -1."""

    def __init__(self, dataset: Any, rows: list[list[int]]):
        self.dataset, self.rows, self.classes = dataset, rows, ()
        self.paths = dataset.paths

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, list[int]] | Unreadable:
        item = self.dataset[index]
        return item if isinstance(item, Unreadable) else (item[0], self.rows[index])


class Renumbered(Dataset):
    """Images whose label i is replaced by ``numbers[i]``."""

    def __init__(self, dataset: Any, numbers: list[int], classes: tuple[str, ...]):
        self.dataset, self.numbers, self.classes = dataset, numbers, classes
        self.paths = getattr(dataset, "paths", [])

    @property
    def labels(self) -> list[int] | None:
        """The labels of all images, if the data set knows them without reading the images."""
        own = getattr(self.dataset, "labels", None)
        return None if own is None else [self.numbers[int(label)] for label in own]

    def content(self, index: int) -> bytes:
        """The bytes of an image, for a digest."""
        return self.dataset.content(index)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, int] | Unreadable:
        item = self.dataset[index]
        return item if isinstance(item, Unreadable) else (item[0], self.numbers[item[1]] if item[1] >= 0 else -1)


def open_labelled(
    data_dir: str | None,
    transform: Callable,
    *,
    dataset: str = "",
    split: str = "validation",
    class_map: Path | None = None,
    num_samples: int | None = None,
) -> ImageDataset | ReadImages | StreamedImages:
    """Opens images for evaluation.

    Args:
        data_dir: a name or folder for ``open_images``, or a .tar file (of images in class folders, or of one .tar per class);
            for a named data set, the folder where it lies or is cached.
        transform: converts a PIL image to a tensor.
        dataset: "" for ``data_dir`` itself, or a name for timm's ``create_dataset``, such as torch/cifar10.
        split: validation, train, or the name of a split or folder.
        class_map: a text file with one class name per line, in the order of the model's outputs; images of other
            classes are left out.
        num_samples: number of images to take from a stream (``wds/``, ``tfds/``, ``hfids/``).

    Raises:
        InputError: the images do not exist, cannot be opened, or do not support one of the arguments.
    """
    known = None if class_map is None else read_class_map(class_map)
    kind = dataset.partition("/")[0].lower()
    if kind not in ("", "torch", *FETCHED):
        raise InputError(f"unknown kind of data set {dataset!r}: use torch/, hfds/, hfids/, tfds/ or wds/ with a name")
    if kind:
        return _named(dataset, kind, data_dir, split, known, num_samples, transform)
    if data_dir is None:
        raise InputError("there are no images to evaluate: give `images` a folder with one subfolder for each class")
    if data_dir.endswith(".tar") and os.path.isfile(data_dir):
        try:
            reader = ReaderImageInTar(data_dir, class_map=known, cache_tarinfo=False)  # timm's cache would be a pickle
        except Exception as error:  # errors of tarfile, or of unpacking an empty list
            raise InputError(f"{data_dir} holds no images that can be read ({error}): give `images` another file") from None
        classes = _names(reader.class_name_to_idx)
        labelled = classes != ("",)  # otherwise the images are not in folders
        return ReadImages(reader, reader.filenames(), classes if labelled else (), transform, labelled)
    root = Path(data_dir)
    own = "train" if split in TRAIN_SPLITS else "test"
    if data_dir != SAMPLE and split not in TRAIN_SPLITS and (root / split).is_dir():
        found: ImageDataset = image_folder(root / split, transform)
    elif split in TRAIN_SPLITS + TEST_SPLITS:
        found = open_images(data_dir, own, transform)
    else:
        raise InputError(f"{data_dir} has no split {split!r}: give `split` a folder in it")
    if known is None:
        return found
    if not isinstance(found, ImageFiles) or not found.labels:
        raise InputError(f"{data_dir} has no class folders: leave `class_map` out")
    kept = [i for i, label in enumerate(found.labels) if found.classes[label] in known]
    if not kept:
        raise InputError(f"{class_map} names none of the classes in {data_dir}: give `class_map` the file of these images")
    labels = [known[found.classes[found.labels[i]]] for i in kept]
    return ImageFiles([found.paths[i] for i in kept], labels, _names(known), transform)


def with_classes_of_model(dataset: Any, known: tuple[str, ...]) -> Any:
    """Renumbers labels to match the model's outputs, for images of a subset of its classes or in another order.

    Args:
        dataset: images with class names.
        known: the model's class names in the order of its outputs; empty if unknown.

    Raises:
        InputError: the images have classes that the model does not know, and not the same number of classes.
    """
    if not known or not dataset.classes or dataset.classes == known:
        return dataset
    if set(dataset.classes) <= set(known):
        return Renumbered(dataset, [known.index(name) for name in dataset.classes], known)
    if len(dataset.classes) != len(known):
        other = next(name for name in dataset.classes if name not in known)
        raise InputError(
            f"the images come in {len(dataset.classes)} classes, but the model knows {len(known)}, "
            f"and {other!r} is none of them: use images of its classes, or another `head`"
        )
    log.warning("the classes of the images have other names than those of the head: folder i is taken for class i")
    return dataset


def _named(
    dataset: str,
    kind: str,
    root: str | None,
    split: str,
    class_map: dict[str, int] | None,
    num_samples: int | None,
    transform: Callable,
) -> ReadImages | StreamedImages:
    if kind == "torch" and class_map is not None:
        raise InputError(f"{dataset} has its own classes: leave `class_map` out")
    if kind == "torch" and root is None:
        raise InputError(f"nothing is downloaded for {dataset}: give `images` the folder where it lies")
    if kind in FETCHED:
        if importlib.util.find_spec(FETCHED[kind]) is None:
            raise InputError(f"{dataset} is read by the package {FETCHED[kind]}, which is not installed: pip install it")
        log.info("opening %s; the package %s may download it", dataset, FETCHED[kind])
    try:
        found = create_dataset(dataset, root, split, class_map=class_map, num_samples=num_samples, download=kind in FETCHED)
    except Exception as error:  # each kind of data set raises its own errors
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"the data set {dataset} cannot be opened ({reason}): check `dataset`, `split`, `images`") from None
    if isinstance(found, IterableImageDataset):
        found.transform = transform
        return StreamedImages(found, num_samples)
    source = getattr(found, "reader", found)
    names = source.filenames() if hasattr(source, "filenames") else [path for path, _ in getattr(found, "samples", [])]
    classes = getattr(source, "class_to_idx", None) or {name: i for i, name in enumerate(getattr(found, "classes", ()))}
    return ReadImages(source, names, _names(classes), transform)


def _names(class_to_idx: dict[str, int]) -> tuple[str, ...]:
    """Class names in order of their indices."""
    return tuple(sorted(class_to_idx, key=class_to_idx.__getitem__))


def read_class_map(path: Path) -> dict[str, int]:
    """Reads class names, one per line, and returns the index of each.

    Raises:
        InputError: the file does not exist or is not a text file; pickles are never read.
    """
    if path.suffix != ".txt":
        raise InputError(f"{path} is no .txt file: give `class_map` a text file with one class name on each line")
    lines = [line.strip() for line in _read(path, "class_map").rstrip().split("\n")]
    return {name: i for i, name in enumerate(lines)}


def read_valid_labels(path: Path) -> list[int]:
    """Reads indices of the model's outputs, one per line: output ``valid[i]`` stands for class i of the images.

    Raises:
        InputError: the file does not exist, or holds something other than integers.
    """
    try:
        return [int(line) for line in _read(path, "valid_labels").split()]
    except ValueError as error:
        raise InputError(f"{path} holds more than whole numbers ({error}): give `valid_labels` one index a line") from None


def with_real_labels(dataset: Any, path: Path) -> tuple[Relabelled, list[int]]:
    """Gives images of ImageNet's validation set the labels of "Are we done with ImageNet?" (Beyer et al., arXiv 2006.07159).

    Args:
        dataset: images whose files have their original names, ILSVRC2012_val_00000001.JPEG.
        path: the authors' real.json, a list with the labels of each image.

    Returns:
        the relabelled images, and the indices of those with at least one label; only these are evaluated.

    Raises:
        InputError: the file is not such a list, or has no entry for one of the images.
    """
    try:
        labels = parse_json(_read(path, "real_labels"))
        assert isinstance(labels, list)
        assert all(isinstance(row, list) and all(isinstance(i, int) for i in row) for row in labels)
    except (ValueError, AssertionError):
        raise InputError(f"{path} is no list of labels for each image: give `real_labels` the file real.json") from None
    width = max(map(len, labels), default=0)
    by_name = {f"ILSVRC2012_val_{i + 1:08d}.JPEG": row for i, row in enumerate(labels)}
    names = [os.path.basename(name) for name in getattr(dataset, "paths", [])]
    unknown = next((name for name in names if name not in by_name), None)
    if unknown is not None or not names:
        raise InputError(f"{path} has no label for the image {unknown or 1}: `real_labels` is for ImageNet's validation images")
    rows = [by_name[name] + [-1] * (width - len(by_name[name])) for name in names]
    return Relabelled(dataset, rows), [i for i, name in enumerate(names) if by_name[name]]


def _read(path: Path, field: str) -> str:
    try:
        return read_text(path, LARGEST)
    except (OSError, ValueError) as error:
        reason = "it is no text" if isinstance(error, UnicodeDecodeError) else one_line(error, 100)
        raise InputError(f"{path} cannot be read ({reason}): give `{field}` another file") from None
