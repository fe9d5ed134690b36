"""Converts an image of any kind to 8 bits per channel: grey, RGB, or RGB with alpha.

Pillow cuts larger values off: a 16-bit image turns white, and one of floats from 0 to 1 turns black. Here they are scaled.
"""

import numpy as np
from PIL import Image

MOST_16 = 2**16 - 1
MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's, by number of channels


def convert(image: Image.Image, channels: int) -> Image.Image:
    """The image with a number of channels: 1 (grey), 3 (RGB) or 4 (RGB, alpha).

    Grey levels of more than 8 bits are scaled as ``rgb`` does. Alpha is 255 if the image has none.
    """
    has_alpha = image.mode in ("RGBA", "LA", "PA") or (image.mode == "P" and "transparency" in image.info)
    return (image if has_alpha and channels == 4 else rgb(image)).convert(MODES[channels])


def rgb(image: Image.Image) -> Image.Image:
    """The image in RGB. Grey levels of 16 or 32 bits and floats are scaled to 0..255.

    Integers of more than 8 bits are taken for 16 bits, or for as many as the largest one needs. Floats are taken for 0..1, for
    0..255 or for 16 bits, whichever is the first that holds all of them; else their range is stretched to 0..255.
    """
    if image.mode.startswith("I;16"):
        return _grey(np.asarray(image) / MOST_16)
    if image.mode in ("I", "F"):
        return _grey(_scaled(np.asarray(image, np.float64), smallest=1.0 if image.mode == "F" else 255.0))
    return image.convert("RGB")


def _scaled(values: np.ndarray, smallest: float) -> np.ndarray:
    """Values between 0 and 1; those that are not finite become 0."""
    values = np.where(np.isfinite(values), values, 0)
    low, high = values.min(), values.max()
    for most in (smallest, 255.0, float(MOST_16)):
        if low >= 0 and high <= most:
            return values / most
    return (values - low) / (high - low or 1)


def _grey(values: np.ndarray) -> Image.Image:
    """The RGB image of grey values [h, w] between 0 and 1."""
    return Image.fromarray((255 * values).round().astype(np.uint8)).convert("RGB")
