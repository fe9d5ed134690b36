"""Several crops of each image, to evaluate a model on a small set of images from another domain."""

import zlib
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vitoats.data.pixels import convert
from vitoats.data.transforms import Preprocessing


@dataclass(frozen=True)
class Crops:
    """Converts a PIL image to [1 + n_random, channels, height, width]: the model's own view, then random square crops.

    A crop's side is uniform between half and all of the image's short side, its position is uniform, and it is resized to the
    model's image size. An image gets the same crops in every run, regardless of the order of images.

    Attributes:
        preprocessing: the model's preprocessing.
        n_random: number of random crops.
        seed: seed of the random crops.
    """

    preprocessing: Preprocessing
    n_random: int
    seed: int

    def __call__(self, image: Image.Image) -> Tensor:
        image = convert(image, self.preprocessing.channels)
        random = np.random.default_rng([self.seed, zlib.crc32(image.tobytes())])
        resize = self.preprocessing.with_crop_mode("squash").transform()
        views = [self.preprocessing.transform()(image)]
        for _ in range(self.n_random):
            side = int(min(image.size) * random.uniform(0.5, 1)) or 1
            left, top = (int(random.integers(0, length - side + 1)) for length in image.size)
            views.append(resize(image.crop((left, top, left + side, top + side))))
        return torch.stack(views)
