"""Features of a frozen backbone, computed once for all heads that are trained on them, and optionally kept in a file."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from vitoats.common.cache import cached_tensors
from vitoats.common.errors import InputError
from vitoats.common.files import remove_file
from vitoats.common.finite import finite_outputs
from vitoats.models import heads

MOST_LAYERS = 4  # as in DINOv2's linear evaluation
PIECE = 16  # batches after which features are kept on disk


@dataclass(frozen=True)
class Features:
    """The features of n images that heads are trained on.

    Attributes:
        tokens: [n, k + 1, d]: the class tokens of the last k blocks in order, each after the final norm; then the mean of the
            last block's patch tokens. k is 0 for a backbone without class tokens.
        labels: [n].
    """

    tokens: Tensor
    labels: Tensor

    @property
    def depth(self) -> int:
        """k, the number of class tokens per image."""
        return self.tokens.shape[1] - 1

    def select(self, layers: int, patch_mean: bool) -> Tensor:
        """The input of a head, [n, (layers + patch_mean) * d], as ``vitoats.models.heads.features`` returns it."""
        return self.tokens[:, self.depth - layers : self.depth + patch_mean].flatten(1)

    def rows(self, index: Tensor) -> "Features":
        """The features of some images."""
        return Features(self.tokens[index], self.labels[index])


def extract(
    tokens: Callable[[Tensor], Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
    progress: Callable[[int], None] = lambda _: None,
) -> Features:
    """Collects the features of labelled images.

    Args:
        tokens: maps images [b, channels, h, w] to [b, k + 1, d], as ``Features`` has them.
        batches: images and labels.
        progress: called with the number of images done.

    Raises:
        InputError: there are no images.
        RunError: a feature is not finite.
    """
    found: list[Tensor] = []
    labels: list[Tensor] = []
    done = 0
    for images, batch_labels in batches:
        found.append(tokens(images))
        labels.append(batch_labels)
        done += len(images)
        progress(done)
    if not found:
        raise InputError("there was no image to compute features of: give `images` a folder with readable images")
    return Features(torch.cat(found), torch.cat(labels))


def tokens_of(backbone: nn.Module) -> Callable[[Tensor], Tensor]:
    """The function that maps images to the tokens [b, k + 1, d] of a timm backbone, on its device."""
    device = next(backbone.parameters()).device
    layers = min(MOST_LAYERS, heads.most_layers(backbone))

    @torch.no_grad()  # not inference_mode: heads are trained on the result
    def tokens(images: Tensor) -> Tensor:
        found = finite_outputs(heads.features(backbone, images.to(device), layers), "features")
        return found.reshape(len(images), layers + 1, -1).cpu()

    return tokens


def cached(folder: Path, key: str, order: list[int], compute: Callable[[list[int]], Features], piece: int) -> Features:
    """Reads the features of images from a folder; computes what is not there, and stores it there.

    Until all are there, each piece has a file, from which an interrupted computation goes on.

    Args:
        folder: the folder.
        key: identifies everything that the features depend on.
        order: indices of the images.
        compute: computes the features of some of these.
        piece: images of a piece.
    """

    def of_piece(start: int) -> dict[str, Tensor]:
        found = compute(order[start : start + piece])
        return {"tokens": found.tokens.contiguous(), "labels": found.labels}

    def make() -> dict[str, Tensor]:
        files = {start: folder / f"features-{key[:20]}-{start}.safetensors" for start in range(0, len(order), piece)}
        found = [cached_tensors(file, partial(of_piece, start)) for start, file in files.items()]
        return {name: torch.cat([tensors[name] for tensors in found]) for name in ("tokens", "labels")}

    whole = Features(**cached_tensors(folder / f"features-{key[:20]}.safetensors", make))
    for path in folder.glob(f"*features-{key[:20]}-*"):  # pieces, and what killed runs have left beside them
        remove_file(folder / path.name.removeprefix(".").removesuffix(".lock").removesuffix(".writing"))
    return whole
