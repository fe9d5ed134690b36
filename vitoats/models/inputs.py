"""What a model takes: examples of it, how the model is called with them, and what its features are.

All that depends on the kind of input stands here, so that what lies behind the first block knows hidden states alone.
"""

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

FINAL_NORMS = ("norm", "fc_norm")  # timm's names; where there are both one is an identity


@dataclass(frozen=True)
class ImageInputs:
    """Batches [b, 3, img_size, img_size] of square RGB images.

    Attributes:
        img_size: height and width in pixels.
    """

    img_size: int

    # at export: the arguments' names, the outputs', and by argument the axes that are not fixed
    names: ClassVar[tuple[str, ...]] = ("images",)
    output_names: ClassVar[tuple[str, ...]] = ("logits",)
    dynamic_axes: ClassVar[tuple[dict[int, str], ...]] = ({0: "batch"},)

    def shape(self, n: int) -> tuple[int, int, int, int]:
        """Of a batch of n."""
        return n, 3, self.img_size, self.img_size

    def zeros(self, n: int) -> Tensor:
        """A batch of n black images, for where only shapes matter."""
        return torch.zeros(self.shape(n))

    def noise(self, n: int, seed: int = 0) -> Tensor:
        """A batch of n images of white noise, the same ones for a seed."""
        return torch.randn(self.shape(n), generator=torch.Generator().manual_seed(seed))

    def call(self, model: nn.Module, batch: Tensor) -> Any:
        """The model's output."""
        return model(batch)

    def features(self, model: Any, batch: Tensor) -> Tensor:
        """Features [b, d] of a timm backbone, for where there is no classifier.

        After the final norm: for tokens [b, n, width] the class token, if there is one, and the mean of the patch tokens; for
        maps [b, ..., width] the mean over all positions.
        """
        return _pooled(model, model.forward_features(batch))

    def features_of(self, model: Any, hidden: Tensor) -> Tensor:
        """The same from the hidden states after the last block."""
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
