"""A model's name and its loading options, in one value."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vitoats.common.sizes import ImageSize
from vitoats.loading.load import load_model
from vitoats.loading.loaded import LoadedModel

log = logging.getLogger("vitoats")


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A model's name and loading options: the arguments of ``loading.load.load_model``."""

    name: str
    checkpoint: Path | None = None
    random_weights: bool = False
    img_size: ImageSize | None = None
    crop_mode: str | None = None
    pos_resample: str | None = None
    head: Path | None = None
    head_layers: int | None = None
    head_name: str | None = None
    model_kwargs: Mapping[str, Any] | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    interpolation: str | None = None
    crop_pct: float | None = None


def open_model(source: ModelSource, with_head: bool = True) -> LoadedModel:
    """Loads a model, and logs the source of its weights and its preprocessing.

    Raises:
        InputError: see ``load_model``.
    """
    loaded = load_model(**asdict(source), with_head=with_head)
    log.info("model: %s (%s)", source.name, loaded.weights)
    log.info("preprocessing: %s", loaded.preprocessing)
    return loaded
