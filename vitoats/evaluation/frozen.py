"""A frozen backbone that linear heads are trained on: a torch model, or an exported file that gives tokens."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vitoats.common.errors import InputError
from vitoats.common.file_digests import files_sha256
from vitoats.common.fingerprint import tensors_sha256
from vitoats.common.sizes import ImageSize
from vitoats.data.transforms import Preprocessing
from vitoats.evaluation.exported import REMEDY, FileBackbone, open_exported
from vitoats.evaluation.features import MOST_LAYERS, tokens_of
from vitoats.loading.loaded import LoadedModel
from vitoats.models.heads import most_layers
from vitoats.runtime.inference import data_file


@dataclass(frozen=True)
class Frozen:
    """A backbone without its head.

    Attributes:
        source: its name before compression.
        preprocessing: of its images.
        depth: k, how many class tokens it gives, at most ``MOST_LAYERS``.
        tokens: maps images [b, channels, h, w] to [b, k + 1, d], as ``evaluation.features.Features`` has them.
        digest: computes a SHA-256 of its weights.
    """

    source: str
    preprocessing: Preprocessing
    depth: int
    tokens: Callable[[Tensor], Tensor]
    digest: Callable[[], str]


def frozen_model(loaded: LoadedModel, device: str) -> Frozen:
    """A torch model on a device."""
    backbone = loaded.timm_model.to(device)
    depth = min(MOST_LAYERS, most_layers(backbone))
    return Frozen(
        loaded.source, loaded.preprocessing, depth, tokens_of(backbone), lambda: tensors_sha256(backbone.state_dict())
    )


def frozen_file(path: str, threads: int, img_size: ImageSize | None) -> Frozen:
    """An exported file.

    Raises:
        InputError: it cannot be run, or does not give class tokens and patches.
    """
    file = open_exported(path, threads, img_size)
    if file.described.get("n_classes"):
        raise InputError(f"{path} has a classifier and gives logits, not features: {REMEDY}")
    backbone = FileBackbone(file)
    if backbone.patches is None:
        raise InputError(f"{path} gives no patches, whose mean heads may take: {REMEDY}")

    def tokens(images: Tensor) -> Tensor:
        return backbone.features(images, backbone.depth).reshape(len(images), backbone.depth + 1, -1)

    def digest() -> str:
        return files_sha256((Path(path), data_file(Path(path))))

    return Frozen(file.described.get("model", ""), file.preprocessing, backbone.depth, torch.no_grad()(tokens), digest)
