"""Standard errors of accuracies and of their differences on the same images, all in percentage points.

They say how much a figure would vary with other test images of the same kind. They do not cover other calibration images.
"""

import numpy as np


def binomial_se(hits: np.ndarray) -> float:
    """Standard error of an accuracy, 100 sqrt(p (1 - p) / n), from hits bool [n]."""
    p = hits.mean()
    return float(100 * np.sqrt(p * (1 - p) / len(hits)))


def paired_difference(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Mean of a - b over images, and its standard error.

    Effects that both models share on an image, above all its difficulty, cancel. For hits, this is the standard error that
    belongs to McNemar's test, sqrt(n10 + n01 - (n10 - n01)^2 / n) / n, where n10 and n01 count the images that only one of the
    models gets right.

    Args:
        a: a figure of one model for each image, [n].
        b: the same for the other, on the same images in the same order.
    """
    d = a.astype(np.float64) - b.astype(np.float64)
    return float(d.mean()), float(d.std() / np.sqrt(len(d)))
