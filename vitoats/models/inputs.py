"""A model's inputs: examples of them, calling the model with them, and computing its features.

Everything that depends on the kind of input is here, and in ``text_inputs``; all other code only deals with hidden states.
"""

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vitoats.models.text_inputs import TextInputs


@dataclass(frozen=True)
class ImageInputs:
    """Batches [b, 3, img_size, img_size] of square RGB images.

    Attributes:
        img_size: height and width in pixels.
    """

    img_size: int

    # for export: names of arguments, and the dynamic axes of each
    names: ClassVar[tuple[str, ...]] = ("images",)
    dynamic_axes: ClassVar[tuple[dict[int, str], ...]] = ({0: "batch"},)

    def shape(self, n: int) -> tuple[int, int, int, int]:
        """The shape of a batch of n images."""
        return n, 3, self.img_size, self.img_size

    def zeros(self, n: int) -> Tensor:
        """A batch of n all-zero images, for use if only shapes matter."""
        return torch.zeros(self.shape(n))

    def noise(self, n: int, seed: int = 0) -> Tensor:
        """A batch of n white-noise images, reproducible by seed."""
        return torch.randn(self.shape(n), generator=torch.Generator().manual_seed(seed))

    def call(self, model: nn.Module, batch: Tensor) -> Any:
        """The model's output."""
        return model(batch)

    def features(self, model: Any, batch: Tensor) -> Tensor:
        """Features [b, d] of a timm backbone, for models without a classifier.

        For tokens [b, n, width], they are the class token, if any, and the mean of the patch tokens, after the final norm. For
        feature maps, they are what timm's own head gives to the classifier.
        """
        return pooled(model, model.forward_features(batch))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def pooled(model: Any, found: Tensor) -> Tensor:
    """The features [b, d] of what ``forward_features`` returns."""
    if found.ndim == 4:
        found = model.forward_head(found, pre_logits=True)
    if found.ndim == 4:  # a head that does not pool
        return found.mean(dim=_positions(model, found))
    if found.ndim == 2:
        return found
    found = getattr(model, "fc_norm", nn.Identity())(found)  # the final norm of models that average their tokens
    prefix = getattr(model, "num_prefix_tokens", 0)
    patches = found[:, prefix:].mean(dim=1)
    return torch.cat([found[:, 0], patches], dim=1) if prefix else patches


def _positions(model: Any, maps: Tensor) -> tuple[int, int]:
    """The axes of a map's height and width."""
    channels_last = maps.shape[-1] == model.num_features
    if channels_last and maps.shape[1] == model.num_features:  # a coincidence
        channels_last = getattr(model, "output_fmt", "NCHW") == "NHWC"
    return (1, 2) if channels_last else (2, 3)


ModelInputs = ImageInputs | TextInputs
