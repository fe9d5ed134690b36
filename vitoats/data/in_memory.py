"""Images that are in memory already, as a dataset of (image [3, size, size], label)."""

from collections.abc import Callable
from typing import Any

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from vitoats.common.errors import InputError

NO_LABEL = -1


class ImagesInMemory(Dataset):
    """A tensor of images, or a dataset of images with or without labels.

    Attributes:
        classes: names of the classes, empty where nobody knows them.
    """

    def __init__(self, images: Any, transform: Callable, img_size: int):
        """Takes the images.

        Args:
            images: a float tensor [n, 3, size, size], preprocessed; or a dataset with a length, whose items, or the first
                part of each, are such tensors [3, size, size] or PIL images, the second part being the label.
            transform: PIL image to tensor.
            img_size: size, in pixels.
        """
        self.images, self.transform, self.img_size = images, transform, img_size
        self.classes: tuple[str, ...] = tuple(getattr(images, "classes", ()))
        if not hasattr(images, "__len__") or not hasattr(images, "__getitem__"):
            raise InputError(
                f"images in memory are a tensor [n, 3, {img_size}, {img_size}] or a Dataset with a length, "
                f"not a {type(images).__name__}: give `images` one of these, or a folder"
            )
        if not len(images):
            raise InputError("there is no image: give `images` some, or a folder")

    labels = None  # they come with the images, where there are any

    def content(self, index: int) -> bytes:
        """The preprocessed image."""
        return self[index][0].numpy().tobytes()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        item = self.images[index]
        image, label = (item[0], int(item[1])) if isinstance(item, (tuple, list)) else (item, NO_LABEL)
        if isinstance(image, Image.Image):
            image = self.transform(image.convert("RGB"))
        wanted = (3, self.img_size, self.img_size)
        if not isinstance(image, Tensor) or tuple(image.shape) != wanted or not image.is_floating_point():
            what = f"{image.dtype} of shape {list(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
            raise InputError(
                f"image {index} is a {what}, not a PIL image or a float tensor of shape {list(wanted)}: give `images` these"
            )
        return image, label
