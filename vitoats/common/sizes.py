"""Image sizes in pixels: one number for squares, (height, width) for other rectangles."""

from collections.abc import Sequence
from typing import Any

ImageSize = int | tuple[int, int]


def sides(size: ImageSize) -> tuple[int, int]:
    """Height and width."""
    return (size, size) if isinstance(size, int) else size


def image_size(height: int, width: int) -> ImageSize:
    """The size of images of this height and width."""
    return height if height == width else (height, width)


def in_words(size: ImageSize) -> str:
    """The size without its unit: 224, or 224x320 for a height of 224 and a width of 320."""
    return str(size) if isinstance(size, int) else "x".join(map(str, size))


def from_json(value: Any) -> Any:
    """Two numbers, a list in JSON, as ``ImageSize`` has them; everything else as it is."""
    return image_size(*value) if isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 2 else value


def is_size(value: Any, most: int) -> bool:
    """Whether a value is an image size of at most ``most`` pixels a side."""
    both = value if isinstance(value, tuple) and len(value) == 2 else (value,)
    return all(type(side) is int and 1 <= side <= most for side in both)
