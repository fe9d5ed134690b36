"""Single weight matrices of a dense model and what their inputs are like, for benchmarks of solvers alone."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vitoats.calibration.hidden_states import HiddenStates
from vitoats.common.errors import InputError
from vitoats.loading.loaded import LoadedModel
from vitoats.methods.statistics import InputStatistics, Needs
from vitoats.models.adapter import adapt


@dataclass(frozen=True)
class Matrix:
    """One matrix; a fused qkv is three.

    Attributes:
        name: of its layer, with the number of the part where that has several.
        weight: [d_out, d_in], float32.
        inputs: moments of what the layer sees in the dense model.
    """

    name: str
    weight: Tensor
    inputs: InputStatistics


def noise_images(n: int, loaded: LoadedModel, seed: int) -> Tensor:
    """Inputs for whoever only looks at time: [n, 3, h, w] of a model's size, normally distributed."""
    size = loaded.preprocessing.img_size
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def dense_matrices(
    loaded: LoadedModel, images: Iterator[Tensor], nsamples: int, batch_size: int, blocks: Sequence[int], needs: Needs
) -> list[Matrix]:
    """All matrices of some blocks, with inputs from images that ran through the dense model.

    Args:
        loaded: the model.
        images: batches [b, 3, h, w].
        nsamples: how many images there may be.
        batch_size: how many images a block runs on at a time.
        blocks: which ones, counted from 0.
        needs: "full" for whole second moments, "diagonal" for their diagonals.

    Raises:
        InputError: there is no such block, or an activation is not finite.
    """
    adapter = adapt(loaded.timm_model, loaded.preprocessing.img_size)
    last = len(adapter.linears) - 1
    if max(blocks) > last:
        raise InputError(f"{loaded.name} has no block {max(blocks)}: its blocks are 0 to {last}")
    hidden = HiddenStates.collect(adapter, images, nsamples, batch_size)
    found = []
    for index in range(max(blocks) + 1):
        if index in blocks:
            inputs = hidden.statistics(adapter, index, adapter.linears[index], needs)
            for linear in adapter.linears[index]:
                parts = adapter.linear(linear).weight.detach().float().chunk(linear.parts)
                for i, weight in enumerate(parts):
                    name = f"{linear.name}[{i}]" if linear.parts > 1 else linear.name
                    found.append(Matrix(name, weight, inputs[linear.name]))
        if index < max(blocks):
            hidden.advance(adapter, index)
    return found
