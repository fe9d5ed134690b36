"""Calibration images: the user's own, optionally mixed with others so that features stay accurate on other images."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor
from torch.utils.data import Subset

from vitoats.common.errors import InputError
from vitoats.data.images import calibration_batches, digest, open_images, shuffled
from vitoats.data.in_memory import ImagesInMemory
from vitoats.data.synthetic import SyntheticImages
from vitoats.data.transforms import Preprocessing

Mix = Literal["none", "synthetic", "general", "both"]


@dataclass(frozen=True)
class CalibrationImages:
    """Calibration images and held-out images.

    Attributes:
        sources: image sets by name, used in equal shares: "own", and "general" and "synthetic" if mixed in.
        held_out: images that are not used for calibration, by name of their source; empty sets are left out.
        nsamples: total number of calibration images, at most.
        seed: seed of the draw.
    """

    sources: dict[str, Any]
    held_out: dict[str, Any]
    nsamples: int
    seed: int

    def batches(self, batch_size: int, workers: int) -> Iterator[Tensor]:
        """Yields calibration batches [b, 3, h, w], one source after the other.

        Raises:
            InputError: too few images can be read, or there are only copies of one.
        """
        if len(self.sources) == 1 and self.are_copies():
            raise InputError(
                "all calibration images are copies of one, which tells too little about a layer's inputs: "
                "give `images` different ones, or add synthetic ones with `calibration_mix='synthetic'`"
            )
        for source, share in zip(self.sources.values(), shares(self.nsamples, len(self.sources)), strict=True):
            if share:
                yield from calibration_batches(source, share, self.seed, batch_size, workers)

    def digests(self) -> dict[str, str]:
        """A digest of each source's images: those used for calibration, and the held-out ones drawn after them."""
        found = {}
        for (name, source), share in zip(self.sources.items(), shares(self.nsamples, len(self.sources)), strict=True):
            if isinstance(source, SyntheticImages):
                found[name] = f"{share} of {source}"
            else:
                found[name] = digest(source, shuffled(source, self.seed)[: share + len(self.held_out.get(name, []))])
        return found

    def are_copies(self) -> bool:
        """Whether all images of the user that are drawn are copies of one; False if only one is asked for."""
        own = self.sources["own"]
        drawn = shuffled(own, self.seed)[: shares(self.nsamples, len(self.sources))[0]]
        return len(drawn) > 1 and all(own.content(i) == own.content(drawn[0]) for i in drawn[1:])


def calibration_images(
    own: Any,
    general_images: str | None,
    mix: Mix,
    nsamples: int,
    held_out: int,
    seed: int,
    preprocessing: Preprocessing,
) -> CalibrationImages:
    """Opens and splits the images.

    Args:
        own: the user's images: a name or folder for ``open_images``, whose training split is used, or images in memory
            (``data.in_memory``).
        general_images: a folder of varied images, for the mixes "general" and "both".
        mix: the images that are mixed in: "none", "synthetic" (``vitoats.data.synthetic``), "general", or "both". Each kind
            gets the same share as the user's images.
        nsamples: total number of calibration images.
        held_out: number of images of each kind to hold out, if that many are left.
        seed: seed of the draws and of the synthetic images.
        preprocessing: the model's.

    Raises:
        InputError: a folder does not exist, or the mix and ``general_images`` contradict each other.
    """
    if mix not in get_args(Mix):
        raise InputError(f"unknown mix {mix!r}: `calibration_mix` takes {', '.join(get_args(Mix))}")
    if (mix in ("general", "both")) != (general_images is not None):
        remedy = "leave `general_images` out, or `calibration_mix`" if general_images else "give `general_images` a folder"
        raise InputError(f"the calibration mix is {mix}: {remedy}")
    transform = preprocessing.transform()
    opened: Any = open_images(own, "train", transform) if isinstance(own, str) else ImagesInMemory(own, preprocessing)
    sources: dict[str, Any] = {"own": opened}
    if general_images is not None:
        sources["general"] = open_images(general_images, "train", transform, field="general_images")
    if mix in ("synthetic", "both"):
        sources["synthetic"] = SyntheticImages(nsamples, preprocessing, seed)
    rest: dict[str, Any] = {}
    for (name, source), share in zip(sources.items(), shares(nsamples, len(sources)), strict=True):
        if name != "synthetic":
            rest[name] = Subset(source, shuffled(source, seed)[share : share + held_out])
    rest["synthetic"] = SyntheticImages(held_out, preprocessing, seed, first=nsamples)
    total = sum(min(share, len(s)) for s, share in zip(sources.values(), shares(nsamples, len(sources)), strict=True))
    return CalibrationImages(sources, {k: v for k, v in rest.items() if len(v)}, total, seed)


def shares(nsamples: int, sources: int) -> list[int]:
    """Splits ``nsamples`` as evenly as possible; the remainder goes to the first sources."""
    return [nsamples // sources + (i < nsamples % sources) for i in range(sources)]
