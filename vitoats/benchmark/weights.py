"""Loads models for speed benchmarks. Speed depends on shapes, not on weights, so random ones will do if none are available."""

import logging
from dataclasses import asdict, replace

from vitoats.loading.hub import WeightsUnavailableError
from vitoats.loading.load import load_model
from vitoats.loading.loaded import LoadedModel
from vitoats.loading.source import ModelSource

log = logging.getLogger("vitoats")


def load_or_randomise(source: ModelSource) -> tuple[LoadedModel, str]:
    """Loads a model with its own weights; if they are unavailable, logs a warning and uses random ones.

    Args:
        source: the model; with ``random_weights``, nothing is downloaded.

    Returns:
        the model, and a description of its weights.

    Raises:
        InputError: the model does not exist, or its checkpoint is broken.
    """
    if not source.random_weights:
        try:
            loaded = load_model(**asdict(source))
            return loaded, loaded.weights
        except WeightsUnavailableError as error:
            log.warning("%s", error)
    return load_model(**asdict(replace(source, random_weights=True))), "random weights"
