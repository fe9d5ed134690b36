"""Synthetic images that need no data: dead leaves over 1/f noise, for calibration in addition to the user's own images.

Weights that are fitted to the inputs of one domain are inaccurate on others, because the second moments of one domain leave
many directions of the input space nearly empty. Synthetic images fill these directions. Natural images have spectra that fall
with frequency, and consist of objects of all sizes that occlude each other ("dead leaves": Ruderman 1997; Lee, Mumford and
Huang 2001; as training images for networks: Baradad et al., arXiv 2106.05963). One image consists of

    noise with the amplitude spectrum 1 / f^a, a from 0.7 to 1.6, three fields mixed by a random rotation of colours
    3 to 40 ellipses, rectangles and triangles with a gradient and some texture; radius 4 / sqrt(u) pixels at 98 px, u uniform
    a blur with a radius of 0 to 1.2 pixels at 98 px
"""

import numpy as np
from PIL import Image, ImageFilter
from torch import Tensor
from torch.utils.data import Dataset

from vitoats.common.sizes import ImageSize, in_words, sides
from vitoats.data.transforms import Preprocessing

REFERENCE_SIZE = 98  # image size in pixels for which the lengths below hold; they scale with the size
SPECTRAL_EXPONENTS = (0.7, 1.6)
COLOUR_WEIGHTS = np.array([1.0, 0.4, 0.25])  # of the three noise fields before the rotation: natural images are mostly grey
NOISE_DEVIATION = 0.18
SHAPES = (3, 40)
SMALLEST_RADIUS, LARGEST_RADIUS, LEAST_U = 4.0, 60.0, 0.004
GRADIENT, TEXTURE = 0.15, 0.25
LARGEST_BLUR = 1.2
ALPHA = 2**32  # index of the image whose grey levels are the fourth channel of image 0


class SyntheticImages(Dataset):
    """``n`` images of an endless seeded series, starting at index ``first``; an item is (image tensor, -1)."""

    def __init__(self, n: int, preprocessing: Preprocessing, seed: int, first: int = 0):
        self.n, self.preprocessing, self.seed, self.first = n, preprocessing, seed, first
        self.transform = preprocessing.transform()

    def __len__(self) -> int:
        return self.n

    def __str__(self) -> str:
        return f"{self.n} images from {self.first} on, {in_words(self.preprocessing.img_size)} px, seed {self.seed}"

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        size, index = self.preprocessing.img_size, self.first + index
        image = synthetic_image(size, self.seed, index)
        if self.preprocessing.channels == 4:
            image.putalpha(synthetic_image(size, self.seed, index + ALPHA).convert("L"))
        return self.transform(image), -1


def synthetic_image(img_size: ImageSize, seed: int, index: int) -> Image.Image:
    """One image of the series, RGB.

    Args:
        img_size: height and width in pixels.
        seed: seed of the series.
        index: position in the series; images do not depend on each other.
    """
    random = np.random.default_rng([seed, index])
    height, width = sides(img_size)
    unit = min(height, width) / REFERENCE_SIZE
    noise = coloured_noise(height, width, random)  # [h, w, 3], mean 0
    canvas = 0.5 + random.uniform(-0.15, 0.15) + noise
    y, x = np.mgrid[:height, :width].astype(np.float32)
    for _ in range(random.integers(*SHAPES, endpoint=True)):
        radius = unit * min(LARGEST_RADIUS, SMALLEST_RADIUS / np.sqrt(random.uniform(LEAST_U, 1)))
        centre, angle, aspect = random.uniform(0, (width, height)), random.uniform(0, 2 * np.pi), random.uniform(0.4, 1)
        u = ((x - centre[0]) * np.cos(angle) + (y - centre[1]) * np.sin(angle)) / radius
        v = ((y - centre[1]) * np.cos(angle) - (x - centre[0]) * np.sin(angle)) / (radius * aspect)
        kind = random.integers(3)
        if kind == 0:
            inside = u**2 + v**2 < 1  # an ellipse
        elif kind == 1:
            inside = np.maximum(abs(u), abs(v)) < 1  # a rectangle
        else:
            inside = (v > -0.5) & (v < 1 - np.sqrt(3) * abs(u))  # a triangle
        slope = random.uniform(-GRADIENT, GRADIENT, 2)
        shade = (u[inside] * slope[0] + v[inside] * slope[1])[:, None]
        canvas[inside] = random.uniform(0, 1, 3) + shade + random.uniform(0, TEXTURE) * noise[inside]
    pixels = (np.clip(canvas, 0, 1) * 255).round().astype(np.uint8)
    return Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(unit * random.uniform(0, LARGEST_BLUR)))


def coloured_noise(height: int, width: int, random: np.random.Generator) -> np.ndarray:
    """Noise [height, width, 3] with mean 0, whose amplitude spectrum falls as 1 / f^a."""
    f = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    f[0, 0] = np.inf  # zero mean
    white = np.fft.rfft2(random.standard_normal((3, height, width)))
    fields = np.fft.irfft2(white / f ** random.uniform(*SPECTRAL_EXPONENTS), s=(height, width))  # [3, h, w]
    fields *= (COLOUR_WEIGHTS / fields.std(axis=(1, 2)))[:, None, None]
    rotation = np.linalg.qr(random.standard_normal((3, 3)))[0]
    noise = np.moveaxis(np.tensordot(rotation, fields, axes=1), 0, -1)
    return noise * (NOISE_DEVIATION / noise.std())
