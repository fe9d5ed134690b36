"""Layers whose feature errors fall exponentially with the share that is kept."""

import numpy as np

from vitoats.allocation.sensitivity import RATES, Sensitivity


def decaying(name: str, parameters: int, scale: float, speed: float) -> Sensitivity:
    """A layer whose feature error is scale * exp(-speed * kept share)."""
    return Sensitivity(name, parameters, tuple(scale * np.exp(-speed * (1 - rate)) for rate in RATES))


LAYERS = [decaying("a", 1000, 0.5, 6.0), decaying("b", 4000, 0.1, 5.0), decaying("c", 2000, 2.0, 8.0)]
