"""Several crops of one image, to look at a model on images it was not calibrated for, where there are few of them."""

import zlib
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vitoats.data.transforms import Preprocessing


@dataclass(frozen=True)
class Crops:
    """PIL image to [1 + n_random, 3, img_size, img_size]: the model's own view, then random squares.

    A square's side is uniform in half to all of the image's short side, its place uniform; it is resized to the model's
    size. An image gets the same squares in every run, wherever it comes in the order.

    Attributes:
        preprocessing: the model's.
        n_random: how many random squares.
        seed: of the squares.
    """

    preprocessing: Preprocessing
    n_random: int
    seed: int

    def __call__(self, image: Image.Image) -> Tensor:
        random = np.random.default_rng([self.seed, zlib.crc32(image.tobytes())])
        resize = self.preprocessing.with_crop_mode("squash").transform()
        views = [self.preprocessing.transform()(image)]
        for _ in range(self.n_random):
            side = int(min(image.size) * random.uniform(0.5, 1)) or 1
            left, top = (int(random.integers(0, length - side + 1)) for length in image.size)
            views.append(resize(image.crop((left, top, left + side, top + side))))
        return torch.stack(views)
