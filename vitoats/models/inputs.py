"""A model's inputs: examples of them, calling the model with them, and computing its features.

Everything that depends on the kind of input is here, and in ``text_inputs``; all other code only deals with hidden states.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.export import Dim

from vitoats.common.sizes import ImageSize, sides
from vitoats.models.text_inputs import TextInputs


@dataclass(frozen=True)
class ImageInputs:
    """Batches [b, channels, h, w] of images.

    Attributes:
        img_size: height and width in pixels; the usual ones if they are free.
        channels: 3 for RGB.
        multiple_of: None if the size is fixed; otherwise, height and width are free multiples of this.
    """

    img_size: ImageSize
    channels: int = 3
    multiple_of: int | None = None

    names: ClassVar[tuple[str, ...]] = ("images",)  # of the arguments, for export

    @property
    def dynamic_axes(self) -> tuple[dict[int, Any], ...]:
        """The dynamic axes of each argument, for ``torch.export``."""
        free = {} if self.multiple_of is None else {2: "height", 3: "width"}
        return ({0: Dim("batch"), **{axis: self.multiple_of * Dim(name) for axis, name in free.items()}},)

    @property
    def traced(self) -> "ImageInputs":
        """Inputs to trace with: of a free size, an unusual one, and no square, as code has special cases for these."""
        height, width = sides(self.img_size)
        step = self.multiple_of
        return self if step is None else replace(self, img_size=(height + step, width + 2 * step))

    @property
    def sizes(self) -> tuple["ImageInputs", ...]:
        """The same inputs with a few sizes, the usual one first; that alone if the size is fixed."""
        step = self.multiple_of
        return (self,) if step is None else (self, replace(self, img_size=(2 * step, 3 * step)), self.traced)

    def shape(self, n: int) -> tuple[int, int, int, int]:
        """The shape of a batch of n images."""
        return n, self.channels, *sides(self.img_size)

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
        """Plain values, for JSON; of RGB images, the size alone."""
        return {"img_size": self.img_size} | ({} if self.channels == 3 else {"channels": self.channels})


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
