"""Calibration images: the user's own, optionally mixed with others so that features stay accurate on other images."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from torch import Tensor
from torch.utils.data import Subset

from vitoats.common.errors import InputError
from vitoats.data.images import calibration_batches, digest, open_images, shuffled
from vitoats.data.in_memory import ImagesInMemory
from vitoats.data.synthetic import SyntheticImages
from vitoats.data.transforms import Preprocessing

Mix = Literal["none", "synthetic", "general", "both"]
OWN_WEIGHT = 2  # images of the user for each of another source; docs/oats-h.md, "Schedule, mix and rank ratio"


@dataclass(frozen=True)
class CalibrationImages:
    """Calibration images and held-out images.

    Attributes:
        sources: image sets by name: "own", and "general" and "synthetic" if mixed in.
        shares: number of images that each source gives.
        held_out: images that are not used for calibration, by name of their source; empty sets are left out.
        seed: seed of the draw.
    """

    sources: dict[str, Any]
    shares: dict[str, int]
    held_out: dict[str, Any]
    seed: int

    @property
    def nsamples(self) -> int:
        """Total number of calibration images."""
        return sum(self.shares.values())

    def at_most(self, nsamples: int) -> "CalibrationImages":
        """The same with at most ``nsamples`` images in all, the first that are drawn of each source."""
        return replace(self, shares=split(min(nsamples, self.nsamples), self.shares))

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
        for name, source in self.sources.items():
            if self.shares[name]:
                yield from calibration_batches(source, self.shares[name], self.seed, batch_size, workers)

    def digests(self) -> dict[str, str]:
        """A digest of each source's images: those used for calibration, and the held-out ones drawn after them."""
        found = {}
        for name, source in self.sources.items():
            if isinstance(source, SyntheticImages):
                found[name] = f"{self.shares[name]} of {source}"
            else:
                drawn = self.shares[name] + len(self.held_out.get(name, []))
                found[name] = digest(source, shuffled(source, self.seed)[:drawn])
        return found

    def are_copies(self) -> bool:
        """Whether all images of the user that are drawn are copies of one; False if only one is asked for."""
        own = self.sources["own"]
        drawn = shuffled(own, self.seed)[: self.shares["own"]]
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
            has half as many images as the user's.
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
    weights = {name: OWN_WEIGHT if name == "own" else 1 for name in sources}
    taken = {name: min(share, len(sources[name])) for name, share in split(nsamples, weights).items()}
    rest: dict[str, Any] = {}
    for name, source in sources.items():
        if name != "synthetic":
            rest[name] = Subset(source, shuffled(source, seed)[taken[name] : taken[name] + held_out])
    rest["synthetic"] = SyntheticImages(held_out, preprocessing, seed, first=nsamples)
    return CalibrationImages(sources, taken, {name: some for name, some in rest.items() if len(some)}, seed)


def split(total: int, weights: dict[str, int]) -> dict[str, int]:
    """Splits ``total`` in proportion to ``weights``: rounded down, and one more each for the first until nothing remains."""
    parts = {name: total * weight // sum(weights.values()) for name, weight in weights.items()}
    rest = total - sum(parts.values())
    return {name: part + (i < rest) for i, (name, part) in enumerate(parts.items())}
