"""Features of a frozen backbone: computed once, for every head that is trained on them, and kept in a file if asked."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from vitoats.common.errors import InputError
from vitoats.common.files import save_tensors
from vitoats.data.transforms import Preprocessing
from vitoats.models import heads

log = logging.getLogger("vitoats")

MOST_LAYERS = 4  # as DINOv2's linear evaluation


@dataclass(frozen=True)
class Features:
    """What heads see of n images.

    Attributes:
        tokens: [n, k + 1, d]: the class tokens of the last k blocks, each after the final norm, the last block's last; then the
            mean of the last block's patch tokens.
        labels: [n].
    """

    tokens: Tensor
    labels: Tensor

    @property
    def depth(self) -> int:
        """k."""
        return self.tokens.shape[1] - 1

    def select(self, layers: int, patch_mean: bool) -> Tensor:
        """What a head takes, [n, (layers + patch_mean) * d], as ``vitoats.models.heads.features`` gives it."""
        return self.tokens[:, self.depth - layers : self.depth + patch_mean].flatten(1)

    def rows(self, index: Tensor) -> "Features":
        """Those of some images."""
        return Features(self.tokens[index], self.labels[index])


@torch.no_grad()  # not inference_mode: heads are trained on what comes out
def extract(
    backbone: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    progress: Callable[[int], None] = lambda _: None,
) -> Features:
    """Runs a timm backbone over labelled images.

    Raises:
        InputError: there were none.
    """
    device = next(backbone.parameters()).device
    layers = min(MOST_LAYERS, len(backbone.blocks))  # type: ignore[arg-type]
    tokens: list[Tensor] = []
    labels: list[Tensor] = []
    done = 0
    for images, batch_labels in batches:
        found = heads.features(backbone, images.to(device), layers)
        tokens.append(found.reshape(len(images), layers + 1, -1).cpu())
        labels.append(batch_labels)
        done += len(images)
        progress(done)
    if not tokens:
        raise InputError("there was no image to compute features of: give `images` a folder with readable images")
    return Features(torch.cat(tokens), torch.cat(labels))


def cached(folder: Path | None, key: str, compute: Callable[[], Features]) -> Features:
    """Reads the features that a key stands for from ``folder``, or computes them and leaves them there."""
    if folder is None:
        return compute()
    path = folder / f"features-{key[:20]}.safetensors"
    if path.is_file():
        try:
            held = safetensors.torch.load_file(str(path))
            log.info("features: read from %s", path)
            return Features(held["tokens"], held["labels"])
        except (safetensors.SafetensorError, KeyError):
            log.warning("%s is damaged and is computed again", path)
    found = compute()
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.writing")
    save_tensors(partial, {"tokens": found.tokens.contiguous(), "labels": found.labels}, {})
    partial.replace(path)
    return found


def fingerprint(backbone: nn.Module, preprocessing: Preprocessing, dataset: Any, order: list[int]) -> str:
    """A digest of all that features depend on: weights, preprocessing, and the images in their order."""
    digest = hashlib.sha256()
    for name, tensor in backbone.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    digest.update(json.dumps([preprocessing.to_dict(), order]).encode())
    if hasattr(dataset, "images"):  # in memory
        digest.update(dataset.images.tobytes() + dataset.labels.tobytes())
    else:
        about = [(path, Path(path).stat().st_size, Path(path).stat().st_mtime_ns) for path in dataset.paths]
        digest.update(json.dumps([about, dataset.labels]).encode())
    return digest.hexdigest()
