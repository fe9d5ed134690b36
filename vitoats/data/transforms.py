"""Image preprocessing, which is stored with every checkpoint and ONNX file."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import vitoats.common.torchvision_ops  # noqa: F401  (before timm)
from vitoats.common.errors import InputError, one_line
from vitoats.common.sizes import ImageSize, from_json, image_size, in_words, is_size, sides
from vitoats.data.pixels import MODES, convert

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform  # isort: skip

CROP_MODES = ("center", "squash", "border")
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
MAX_IMG_SIZE = 4096
CHANNELS = "1, 3 or 4"
CROP_PCT = (0.1, 2.0)  # above 1, "border" leaves a border


@dataclass(frozen=True)
class Preprocessing:
    """timm's evaluation preprocessing, in timm's terms.

    Attributes:
        img_size: final height and width in pixels: one number for squares, (height, width) for others.
        crop_pct: the crop's share of the resized image; with "center" the short side is resized to img_size / crop_pct.
        crop_mode: "center", "squash" (both sides resized, nothing cropped) or "border".
        interpolation: one of ``INTERPOLATIONS``.
        mean: mean per channel, for pixel values in 0..1; as many as the images have channels.
        std: standard deviation per channel.

    Raises:
        InputError: a value is invalid.
    """

    img_size: ImageSize
    crop_pct: float = 0.875
    crop_mode: str = "center"
    interpolation: str = "bicubic"
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD

    def __post_init__(self):
        if not is_size(self.img_size, MAX_IMG_SIZE):
            raise InputError(f"images of {_brief(self.img_size)} px cannot be: sizes go from 1 to {MAX_IMG_SIZE} (`img_size`)")
        fits = {
            "crop_pct": _is_number(self.crop_pct) and CROP_PCT[0] <= self.crop_pct <= CROP_PCT[1],
            "crop_mode": self.crop_mode in CROP_MODES,
            "interpolation": self.interpolation in INTERPOLATIONS,
            "mean": _is_colour(self.mean),
            "std": _is_colour(self.std) and min(self.std) > 0 and len(self.std) == len(self.mean),
        }
        for name, fit in fits.items():
            if not fit:
                raise InputError(
                    f"this preprocessing cannot be, its {name} is {_brief(getattr(self, name))}: give another `{name}`"
                )

    @classmethod
    def from_timm(cls, config: dict[str, Any]) -> "Preprocessing":
        """Converts the data configuration that timm resolves for a model.

        Raises:
            InputError: the model takes images of more channels than files of images have.
        """
        channels, height, width = config["input_size"]
        if channels not in MODES:
            raise InputError(
                f"the model takes images of {channels} channels, unlike image files: use a model of {CHANNELS} channels"
            )
        return cls(
            image_size(height, width),
            config["crop_pct"],
            config["crop_mode"],
            config["interpolation"],
            tuple(config["mean"]),
            tuple(config["std"]),
        )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Preprocessing":
        """The inverse of ``to_dict``.

        Raises:
            InputError: values are missing, unknown or invalid.
        """
        try:
            lists = {"mean": tuple(values["mean"]), "std": tuple(values["std"]), "img_size": from_json(values["img_size"])}
            return cls(**{**values, **lists})
        except (TypeError, KeyError) as error:
            raise InputError(f"this is no preprocessing ({one_line(error, 100)})") from None

    @property
    def channels(self) -> int:
        """Number of channels of an image."""
        return len(self.mean)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    def with_crop_mode(self, crop_mode: str) -> "Preprocessing":
        """The same preprocessing with another crop mode; "squash" resizes to the exact size, so nothing is cropped."""
        if crop_mode not in CROP_MODES:
            raise InputError(f"unknown crop mode {crop_mode!r}: use {', '.join(CROP_MODES)}")
        return replace(self, crop_mode=crop_mode, crop_pct=1.0 if crop_mode == "squash" else self.crop_pct)

    def changed(self, crop_mode: str | None, settings: Mapping[str, Any]) -> "Preprocessing":
        """The same preprocessing with another crop mode, and with those ``settings`` that are not None.

        Raises:
            InputError: a value is invalid, or mean or std has neither one number nor one for each channel, or they are for
                pixels in 0..255.
        """
        own = self if crop_mode is None else self.with_crop_mode(crop_mode)
        given = {name: value for name, value in settings.items() if value is not None}
        for name in given.keys() & {"mean", "std"}:
            values = given[name] if isinstance(given[name], Sequence) else [given[name]]
            if len(values) not in (1, self.channels):
                raise InputError(f"`{name}` takes one number, or one for each of {self.channels} channels, not {len(values)}")
            if name == "mean" and max(values) > 1:
                raise InputError(f"a mean of {max(values):g} is for pixels in 0..255: divide `mean` and `std` by 255")
            given[name] = tuple(values) * (self.channels // len(values))
        return replace(own, **given)

    def transform(self) -> Callable:
        """The transform of a PIL image of any kind to a float tensor [channels, height, width]."""
        own = create_transform(
            input_size=(self.channels, *sides(self.img_size)),
            is_training=False,
            interpolation=self.interpolation,
            mean=self.mean,
            std=self.std,
            crop_pct=self.crop_pct,
            crop_mode=self.crop_mode,
        )
        own.transforms.insert(0, functools.partial(convert, channels=self.channels))
        return own

    def __str__(self) -> str:
        def numbers(values: tuple[float, ...]) -> str:
            return "/".join(f"{v:g}" for v in values)

        return (
            f"{in_words(self.img_size)} px, {self.crop_mode} crop {self.crop_pct:.3g}, {self.interpolation}, "
            f"mean {numbers(self.mean)}, std {numbers(self.std)}"
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_colour(values: Any) -> bool:
    return isinstance(values, tuple) and len(values) in MODES and all(_is_number(v) for v in values)


def _brief(value: Any) -> str:
    return one_line(ValueError(repr(value)), 50)
