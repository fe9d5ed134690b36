"""A model's inputs: examples of them, calling the model with them, and computing its features.

Everything that depends on the kind of input is here, and in ``text_inputs``; all other code only deals with hidden states.
"""

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vitoats.models.text_inputs import TextInputs

FINAL_NORMS = ("norm", "fc_norm")  # timm's names; if a model has both, one is an identity


@dataclass(frozen=True)
class ImageInputs:
    """Batches [b, 3, img_size, img_size] of square RGB images.

    Attributes:
        img_size: height and width in pixels.
    """

    img_size: int

    # for export: names of arguments and outputs, and the dynamic axes of each argument
    names: ClassVar[tuple[str, ...]] = ("images",)
    output_names: ClassVar[tuple[str, ...]] = ("logits",)
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

        They are taken after the final norm: for tokens [b, n, width] the class token, if any, and the mean of the patch tokens;
        for feature maps [b, ..., width] the mean over all positions.
        """
        return _pooled(model, model.forward_features(batch))

    def features_of(self, model: Any, hidden: Tensor) -> Tensor:
        """The same features, computed from the hidden states after the last block."""
        for name in FINAL_NORMS:
            hidden = getattr(model, name, nn.Identity())(hidden)
        return _pooled(model, hidden)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def _pooled(model: Any, normed: Tensor) -> Tensor:
    if normed.ndim != 3:
        return normed.flatten(1, -2).mean(dim=1)
    prefix = getattr(model, "num_prefix_tokens", 0)
    patches = normed[:, prefix:].mean(dim=1)
    return torch.cat([normed[:, 0], patches], dim=1) if prefix else patches


ModelInputs = ImageInputs | TextInputs
