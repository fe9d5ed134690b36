"""A model together with its name, preprocessing and origin."""

import copy
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from vitoats.data.transforms import Preprocessing
from vitoats.loading.origin import Origin
from vitoats.models.features import FeatureOutputs
from vitoats.models.heads import LinearHeadClassifier
from vitoats.models.inputs import ImageInputs
from vitoats.models.positions import free_image_size


@dataclass
class LoadedModel(Origin):
    """A model ready for evaluation or compression.

    Attributes:
        name: the name that the model was requested by.
        model: maps images to logits, or to features without a classifier; in eval mode.
        preprocessing: its image preprocessing.
        weights: the source of its weights, in words.
        about: the content of vitoats.json for a model that compress wrote; empty for others.
        multiple_of: what height and width of images must be multiples of, if they are free; None if the size is fixed.
    """

    name: str
    model: nn.Module
    preprocessing: Preprocessing
    weights: str
    about: dict[str, Any] = field(default_factory=dict)
    multiple_of: int | None = None

    @property
    def timm_model(self) -> Any:
        """The timm model inside: ``model`` itself, or the backbone under a linear head or feature outputs."""
        return self.model.backbone if isinstance(self.model, (LinearHeadClassifier, FeatureOutputs)) else self.model

    @property
    def backbone(self) -> nn.Module:
        """The module with the blocks."""
        return self.timm_model

    def dense_tensors(self) -> dict[str, Tensor]:
        """The backbone's tensors before it is compressed."""
        return self.backbone.state_dict()

    @property
    def inputs(self) -> ImageInputs:
        """The model's inputs."""
        return ImageInputs(self.preprocessing.img_size, self.preprocessing.channels, self.multiple_of)

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the outputs, for export."""
        return self.model.names if isinstance(self.model, FeatureOutputs) else ("logits",)

    def with_features(self, features: str) -> "LoadedModel":
        """The same model with tokens as its outputs (``vitoats.models.features``) and without its head.

        Raises:
            InputError: it has no such features.
        """
        return replace(self, model=FeatureOutputs(self.timm_model, features).eval())

    def with_free_size(self) -> "LoadedModel":
        """A copy that interpolates its positions to the size of its images (``vitoats.models.positions``).

        Raises:
            InputError: the model takes images of one size only.
        """
        copied = copy.deepcopy(self)
        copied.multiple_of = free_image_size(copied.timm_model)
        return copied

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of the outputs; empty if the head does not record them."""
        return self.model.info.classes if isinstance(self.model, LinearHeadClassifier) else ()

    @property
    def n_classes(self) -> int:
        """Number of classes; 0 if the outputs are features."""
        if isinstance(self.model, FeatureOutputs):
            return 0
        return self.model.head.out_features if isinstance(self.model, LinearHeadClassifier) else self.timm_model.num_classes
