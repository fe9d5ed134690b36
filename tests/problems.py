"""Layers to compress: weights, and inputs that correlate or do not."""

import numpy as np
import torch

import vitoats.methods  # noqa: F401  (fills the table of methods)
from vitoats.methods.registry import METHODS
from vitoats.methods.statistics import InputStatistics

PATTERNS = ["row", "layer", "1x2", "1x4", "2:4", "1:4", "5:8"]


def layer(seed: int, d_out: int, d_in: int, dtype=torch.float64):
    """Weights, and inputs that correlate, differ in scale and have means: (W [d_out, d_in], X [n, d_in])."""
    random = np.random.default_rng(seed)
    mix = random.standard_normal((d_in, d_in)) / d_in**0.5 + 0.7 * np.eye(d_in)
    X = random.standard_normal((8 * d_in, d_in)) @ mix * np.exp(0.5 * random.standard_normal(d_in)) + random.random(d_in)
    return torch.from_numpy(random.standard_normal((d_out, d_in))).to(dtype), torch.from_numpy(X)


def uncorrelated(d_in: int, seed: int = 0) -> InputStatistics:
    """Inputs of mean 0 that do not correlate: H is diagonal."""
    moments = torch.from_numpy(np.exp(np.random.default_rng(seed).standard_normal(d_in)))
    return InputStatistics(moments, moments.diag(), torch.zeros(d_in, dtype=torch.float64))


def config_for(name: str, pattern: str, compression: float = 0.5, **options):
    return METHODS[name].config(compression=None if ":" in pattern else compression, pattern=pattern, **options)


def output_error(weight, X, result) -> float:
    return ((weight - result.S - result.U @ result.V).double() @ X.T).square().sum().item() / len(X)


def random_mask(seed, shape, equal: bool):
    """What is kept: half of each row, or shares that differ from none to all."""
    random = np.random.default_rng(seed)
    if equal:
        return torch.from_numpy(random.permuted(np.arange(shape[0] * shape[1]).reshape(shape) % 2 == 0, axis=1))
    mask = torch.from_numpy(random.random(shape) < random.random((shape[0], 1)))
    mask[0], mask[1] = False, True  # a row that keeps nothing, and one that keeps all
    return mask
