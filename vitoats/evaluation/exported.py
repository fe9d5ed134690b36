"""An exported file with its metadata, and the tokens of one that was exported with features as the input of linear heads."""

import itertools
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitoats.common.errors import InputError, RunError, one_line
from vitoats.common.finite import finite_outputs
from vitoats.common.plain_values import text, whole
from vitoats.common.sizes import ImageSize, in_words, sides
from vitoats.data.transforms import Preprocessing
from vitoats.evaluation.features import MOST_LAYERS
from vitoats.models.heads import HeadInfo
from vitoats.runtime.inference import Session, metadata, session

REMEDY = "export it with `features='all'`, or `features='layers=4'` for heads of 4 layers"


@dataclass(frozen=True)
class Exported:
    """An open file.

    Attributes:
        path: where it is.
        session: in ONNX Runtime.
        described: the metadata that export wrote.
        preprocessing: of its images.
    """

    path: str
    session: Session
    described: dict[str, Any]
    preprocessing: Preprocessing

    def run(self, images: Tensor) -> dict[str, Tensor]:
        """The outputs for images [b, channels, h, w], by name.

        Raises:
            RunError: ONNX Runtime cannot compute them.
        """
        names = [output.name for output in self.session.get_outputs()]
        try:
            found = self.session.run(None, {self.session.get_inputs()[0].name: images.numpy()})
        except Exception as error:  # onnxruntime's errors share no public base class
            raise RunError(f"{self.path} fails in ONNX Runtime ({one_line(error)}): export it again") from None
        return {name: torch.from_numpy(np.asarray(output)) for name, output in zip(names, found, strict=True)}


def open_exported(path: str, threads: int, img_size: ImageSize | None = None) -> Exported:
    """Opens a file that export wrote.

    Args:
        path: the file.
        threads: CPU threads; 0 for all cores.
        img_size: another image size than the usual one, for a file that takes several.

    Raises:
        InputError: the file cannot be run, has no vitoats metadata, or does not take images of this size.
    """
    opened = session(path, threads)
    try:
        described = _checked(metadata(opened))
        preprocessing = Preprocessing.from_dict(described["preprocessing"])
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path} does not say how its images are preprocessed: export it with tools/export_onnx.py") from None
    if img_size not in (None, preprocessing.img_size):
        _check_size(path, img_size, preprocessing, described.get("img_size_multiple_of"))
        preprocessing = replace(preprocessing, img_size=img_size)
    return Exported(path, opened, described, preprocessing)


def _checked(described: dict[str, Any]) -> dict[str, Any]:
    """The metadata, if what is used of it can be.

    Raises:
        ValueError: a value is of another type.
    """
    for key, least in (("n_classes", 0), ("blocks", 0), ("img_size_multiple_of", 1)):
        whole(described.get(key, least), key, least)
    for word in (described.get("model", ""), *described.get("classes", ())):
        text(word, "a name")
    return described


def _check_size(path: str, img_size: ImageSize, own: Preprocessing, step: int | None) -> None:
    if step is None:
        remedy = "leave `img_size` out, or export it with `dynamic_img_size`"
        raise InputError(f"{path} takes images of {in_words(own.img_size)} px only: {remedy}")
    if any(side % step for side in sides(img_size)):
        raise InputError(f"{path} takes image sizes that are multiples of {step}, not {in_words(img_size)}: change `img_size`")


class FileBackbone:
    """An exported file that gives tokens, in the place of a backbone.

    Attributes:
        file: the file.
        layers: of how many last blocks it gives the class token.
        patches: name of the output with the last block's patch tokens; None without it.
        width: of a token.
    """

    def __init__(self, file: Exported):
        """Finds the tokens among the outputs.

        Raises:
            InputError: the outputs are no tokens, or none that heads take.
        """
        self.file = file
        shapes = {output.name: output.shape for output in file.session.get_outputs()}
        last = file.described.get("blocks", 0) - 1
        cls = ["cls"] if "cls" in shapes else [f"cls_{i}" for i in range(last, -1, -1)]
        self._cls = list(itertools.takewhile(shapes.__contains__, cls))
        self.layers = len(self._cls)
        self.patches = next((name for name in ("patches", f"patches_{last}") if name in shapes), None)
        if not self.layers:
            raise InputError(f"{file.path} gives no class token of its last block, which heads take: {REMEDY}")
        self.width = shapes[self._cls[0]][-1]

    def check(self, info: HeadInfo) -> None:
        """Refuses a head that takes other tokens.

        Raises:
            InputError: the file does not give what the head takes.
        """
        if not 1 <= info.layers <= self.layers or (info.patch_mean and self.patches is None):
            takes = f"{info.layers} class tokens{' and the patches' if info.patch_mean else ''}"
            gives = f"{self.layers}{' and the patches' if self.patches else ', and no patches'}"
            raise InputError(f"it takes {takes}, and {self.file.path} gives {gives}: {REMEDY}")

    def features(self, images: Tensor, layers: int, patch_mean: bool = True) -> Tensor:
        """What a head takes, [b, (layers + patch_mean) * width], as ``vitoats.models.heads.features`` gives it."""
        outputs = self.file.run(images)
        tokens = [outputs[name] for name in reversed(self._cls[:layers])]
        if patch_mean:
            assert self.patches is not None
            tokens.append(outputs[self.patches].mean(dim=1))
        return finite_outputs(torch.cat(tokens, dim=1), "features")

    @property
    def depth(self) -> int:
        """How many class tokens heads are trained on."""
        return min(MOST_LAYERS, self.layers)
