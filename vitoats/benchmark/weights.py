"""Models for benchmarks of speed, which depends on shapes and not on weights: random ones do where the own cannot be had."""

import logging
from pathlib import Path

from vitoats.loading.hub import WeightsUnavailableError
from vitoats.loading.load import load_model
from vitoats.loading.loaded import LoadedModel

log = logging.getLogger("vitoats")


def load_or_randomise(
    name: str, checkpoint: Path | None = None, random_weights: bool = False, img_size: int | None = None
) -> tuple[LoadedModel, str]:
    """Loads a model with its own weights, or with random ones where those cannot be fetched, which is logged as a warning.

    Args:
        name, checkpoint, img_size: as for ``load_model``.
        random_weights: take random ones anyway; nothing is fetched.

    Returns:
        the model, and whose weights it has, in words.

    Raises:
        InputError: there is no such model, or its checkpoint is broken.
    """
    if not random_weights:
        try:
            loaded = load_model(name, checkpoint=checkpoint, img_size=img_size)
            return loaded, loaded.weights
        except WeightsUnavailableError as error:
            log.warning("%s", error)
    return load_model(name, checkpoint=checkpoint, random_weights=True, img_size=img_size), "random weights"
