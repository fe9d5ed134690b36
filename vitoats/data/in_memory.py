"""Images already in memory, as a dataset of (image [channels, height, width], label)."""

from typing import Any

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from vitoats.common.errors import InputError
from vitoats.common.sizes import sides
from vitoats.data.transforms import Preprocessing

NO_LABEL = -1


class ImagesInMemory(Dataset):
    """A tensor of images, or a dataset of images with or without labels.

    Attributes:
        classes: class names; empty if unknown.
    """

    def __init__(self, images: Any, preprocessing: Preprocessing):
        """Wraps the images.

        Args:
            images: a preprocessed float tensor [n, channels, height, width], or a dataset with a length. The dataset's items
                are images or (image, label) tuples, each image being a PIL image or a preprocessed float tensor.
            preprocessing: the model's, which says how large images are.

        Raises:
            InputError: there are no images, or they are of another type.
        """
        self.images, self.transform = images, preprocessing.transform()
        self.shape = (preprocessing.channels, *sides(preprocessing.img_size))
        self.classes: tuple[str, ...] = tuple(getattr(images, "classes", ()))
        if not hasattr(images, "__len__") or not hasattr(images, "__getitem__"):
            raise InputError(
                f"images in memory are a tensor [n, {', '.join(map(str, self.shape))}] or a Dataset with a length, "
                f"not a {type(images).__name__}: give `images` one of these, or a folder"
            )
        if not len(images):
            raise InputError("there is no image: give `images` some, or a folder")

    labels = None  # labels, if any, come with the images

    def content(self, index: int) -> bytes:
        """The bytes of the preprocessed image."""
        return self[index][0].numpy().tobytes()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        item = self.images[index]
        image, label = (item[0], int(item[1])) if isinstance(item, (tuple, list)) else (item, NO_LABEL)
        if isinstance(image, Image.Image):
            image = self.transform(image)
        if not isinstance(image, Tensor) or tuple(image.shape) != self.shape or not image.is_floating_point():
            what = f"{image.dtype} of shape {list(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
            raise InputError(
                f"image {index} is a {what}, not a PIL image or a float tensor of shape {list(self.shape)}: give `images` these"
            )
        return image, label
