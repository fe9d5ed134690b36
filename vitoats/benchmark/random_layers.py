"""A model with random zeros and low-rank terms: speed depends on how many there are, not on which."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from vitoats.benchmark.products import Pattern, random_zeros
from vitoats.format.layers import SparseLowRankLinear, replace_module
from vitoats.loading.loaded import LoadedModel
from vitoats.models.adapter import adapt
from vitoats.models.shapes import LayerShape, layer_shapes

Content = Callable[[LayerShape], tuple[float, int]]  # the percentage of zeros of S, and the rank of each part


def with_random_layers(loaded: LoadedModel, content: Content, pattern: Pattern, random: np.random.Generator) -> LoadedModel:
    """A copy of a dense model whose linear layers in the blocks are sparse + low-rank, at random.

    Args:
        loaded: the dense model.
        content: what a layer holds.
        pattern: pattern of the zeros.
        random: the source of zeros and low-rank terms.
    """
    found = copy.deepcopy(loaded)
    for name, shape in layer_shapes(adapt(loaded.timm_model, loaded.inputs)).items():
        module: Any = found.timm_model.get_submodule(name)
        replace_module(found.timm_model, name, random_layer(module, shape, content, pattern, random))
    return found


def random_layer(
    module: nn.Linear, shape: LayerShape, content: Content, pattern: Pattern, random: np.random.Generator
) -> SparseLowRankLinear:
    """What ``with_random_layers`` makes of a layer."""
    zeros, rank = content(shape)
    S = random_zeros(module.weight.detach().cpu().numpy(), zeros, pattern, random)
    U, V = ([torch.from_numpy(term) for term in stack] for stack in random_low_rank(shape, rank, random))
    return SparseLowRankLinear(torch.from_numpy(S), U, V, module.bias)


def of_budget(config: Any) -> Content:
    """What a method leaves of a layer, for a config that keeps the same number of weights in each row."""

    def content(shape: LayerShape) -> tuple[float, int]:
        budget = config.budget(shape.d_out // shape.parts, shape.d_in)
        return 100 * (1 - budget.kept_per_group / shape.d_in), budget.rank

    return content


def random_low_rank(shape: LayerShape, rank: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Random U [parts, d_out / parts, rank] and V [parts, rank, d_in] whose product is about as large as the weights."""
    scale = (shape.d_in * max(1, rank)) ** -0.25
    of_u, of_v = (shape.parts, shape.d_out // shape.parts, rank), (shape.parts, rank, shape.d_in)
    U, V = (scale * random.standard_normal(size, np.float32) for size in (of_u, of_v))
    return U.astype(np.float32), V.astype(np.float32)
