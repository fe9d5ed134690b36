"""The images that calibrate: the user's own, and what is mixed in so that features also hold on other images."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor
from torch.utils.data import Subset

from vitoats.common.errors import InputError
from vitoats.data.images import calibration_batches, digest, open_images, shuffled
from vitoats.data.in_memory import ImagesInMemory
from vitoats.data.synthetic import SyntheticImages

Mix = Literal["none", "synthetic", "general", "both"]


@dataclass(frozen=True)
class CalibrationImages:
    """Images that calibrate, and such as do not.

    Attributes:
        sources: equal shares, by name: "own", and of "synthetic" and "general" those that are mixed in.
        held_out: images of the sources that take no part, by name; empty sets are left out.
        nsamples: how many images calibrate in all, at most.
        seed: of the draw.
    """

    sources: dict[str, Any]
    held_out: dict[str, Any]
    nsamples: int
    seed: int

    def batches(self, batch_size: int, workers: int) -> Iterator[Tensor]:
        """Yields batches [b, 3, h, w], one source after the other.

        Raises:
            InputError: too few images can be read.
        """
        for source, share in zip(self.sources.values(), shares(self.nsamples, len(self.sources)), strict=True):
            if share:
                yield from calibration_batches(source, share, self.seed, batch_size, workers)

    def digests(self) -> dict[str, str]:
        """Identifies the images of each source: those that calibrate, and those held out, the next in line."""
        found = {}
        for (name, source), share in zip(self.sources.items(), shares(self.nsamples, len(self.sources)), strict=True):
            if isinstance(source, SyntheticImages):
                found[name] = f"{share} of {source}"
            else:
                found[name] = digest(source, shuffled(source, self.seed)[: share + len(self.held_out.get(name, []))])
        return found


def calibration_images(
    own: Any,
    general_images: str | None,
    mix: Mix,
    nsamples: int,
    held_out: int,
    seed: int,
    img_size: int,
    transform: Callable,
) -> CalibrationImages:
    """Opens and splits the images.

    Args:
        own: the user's images: what ``open_images`` takes, of which the training split counts, or images in memory
            (``data.in_memory``).
        general_images: a folder of varied images, for the mixes "general" and "both".
        mix: "none", or what is mixed in, each kind as much as the user's images: "synthetic" (``vitoats.data.synthetic``),
            "general", or "both".
        nsamples: how many images calibrate, in all.
        held_out: how many of each kind to keep apart, where there are so many more.
        seed: of the draws and of the synthetic images.
        img_size: of the synthetic images, in pixels.
        transform: PIL image to tensor.

    Raises:
        InputError: there is no such folder, or the mix and ``general_images`` contradict each other.
    """
    if mix not in get_args(Mix):
        raise InputError(f"unknown mix {mix!r}: `calibration_mix` takes {', '.join(get_args(Mix))}")
    if (mix in ("general", "both")) != (general_images is not None):
        remedy = "leave `general_images` out, or `calibration_mix`" if general_images else "give `general_images` a folder"
        raise InputError(f"the calibration mix is {mix}: {remedy}")
    opened: Any = open_images(own, "train", transform) if isinstance(own, str) else ImagesInMemory(own, transform, img_size)
    sources: dict[str, Any] = {"own": opened}
    if general_images is not None:
        sources["general"] = open_images(general_images, "train", transform)
    if mix in ("synthetic", "both"):
        sources["synthetic"] = SyntheticImages(nsamples, img_size, seed, transform)
    rest: dict[str, Any] = {}
    for (name, source), share in zip(sources.items(), shares(nsamples, len(sources)), strict=True):
        if name != "synthetic":
            rest[name] = Subset(source, shuffled(source, seed)[share : share + held_out])
    rest["synthetic"] = SyntheticImages(held_out, img_size, seed, transform, first=nsamples)
    total = sum(min(share, len(s)) for s, share in zip(sources.values(), shares(nsamples, len(sources)), strict=True))
    return CalibrationImages(sources, {k: v for k, v in rest.items() if len(v)}, total, seed)


def shares(nsamples: int, sources: int) -> list[int]:
    """Splits ``nsamples`` as evenly as can be; the first sources get what is left over."""
    return [nsamples // sources + (i < nsamples % sources) for i in range(sources)]
