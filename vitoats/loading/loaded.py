"""A model together with what is known of it."""

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from vitoats.data.transforms import Preprocessing
from vitoats.models.heads import LinearHeadClassifier
from vitoats.models.inputs import ImageInputs


@dataclass
class LoadedModel:
    """A model ready for evaluation or compression.

    Attributes:
        name: the name that was asked for.
        model: images to logits, or to features where there is no classifier; in eval mode.
        preprocessing: what its images go through.
        weights: where its weights came from, in words.
        about: what vitoats.json says of a model that compress wrote; empty for others.
    """

    name: str
    model: nn.Module
    preprocessing: Preprocessing
    weights: str
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def source(self) -> str:
        """The name of the model before it was compressed; ``name`` where it was not."""
        return self.about.get("model", self.name)

    @property
    def timm_model(self) -> Any:
        """The timm model inside: ``model`` itself, or the backbone under a linear head."""
        return self.model.backbone if isinstance(self.model, LinearHeadClassifier) else self.model

    @property
    def inputs(self) -> ImageInputs:
        """What the model takes."""
        return ImageInputs(self.preprocessing.img_size)

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of the outputs; empty where its head does not say them."""
        return self.model.info.classes if isinstance(self.model, LinearHeadClassifier) else ()

    @property
    def n_classes(self) -> int:
        """How many classes its outputs are logits of; 0 where they are features."""
        return self.model.head.out_features if isinstance(self.model, LinearHeadClassifier) else self.timm_model.num_classes
