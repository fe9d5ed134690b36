"""Loads models for speed benchmarks. Speed depends on shapes, not on weights, so random ones will do if none are available."""

import logging
from pathlib import Path

from vitoats.loading.hub import WeightsUnavailableError
from vitoats.loading.load import load_model
from vitoats.loading.loaded import LoadedModel

log = logging.getLogger("vitoats")


def load_or_randomise(
    name: str, checkpoint: Path | None = None, random_weights: bool = False, img_size: int | None = None
) -> tuple[LoadedModel, str]:
    """Loads a model with its own weights; if they are unavailable, logs a warning and uses random ones.

    Args:
        name, checkpoint, img_size: as for ``load_model``.
        random_weights: use random weights in any case; nothing is downloaded.

    Returns:
        the model, and a description of its weights.

    Raises:
        InputError: the model does not exist, or its checkpoint is broken.
    """
    if not random_weights:
        try:
            loaded = load_model(name, checkpoint=checkpoint, img_size=img_size)
            return loaded, loaded.weights
        except WeightsUnavailableError as error:
            log.warning("%s", error)
    return load_model(name, checkpoint=checkpoint, random_weights=True, img_size=img_size), "random weights"
