"""Single weight matrices of a dense model and the statistics of their inputs, for benchmarks of the solvers alone."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from vitoats.calibration.hidden_states import HiddenStates
from vitoats.calibration.moments import input_statistics
from vitoats.calibration.walk import walk
from vitoats.common.errors import InputError
from vitoats.loading.loaded import LoadedModel
from vitoats.methods.statistics import InputStatistics, StatisticsLevel
from vitoats.models.adapter import adapt


@dataclass(frozen=True)
class Matrix:
    """One weight matrix; a fused qkv counts as three.

    Attributes:
        name: the layer's name, with the index of the part if the layer has several.
        weight: [d_out, d_in], float32.
        inputs: moments of the layer's input in the dense model.
    """

    name: str
    weight: Tensor
    inputs: InputStatistics


def dense_matrices(
    loaded: LoadedModel, images: Iterator[Tensor], nsamples: int, batch_size: int, blocks: Sequence[int], level: StatisticsLevel
) -> list[Matrix]:
    """All matrices of some blocks, with input statistics from images that ran through the dense model.

    Args:
        loaded: the model.
        images: batches [b, 3, h, w].
        nsamples: largest number of images.
        batch_size: number of images that a block processes at a time.
        blocks: indices of the blocks, from 0.
        level: "full" for full second moments, "diagonal" for their diagonals.

    Raises:
        InputError: a block does not exist, or an activation is not finite.
    """
    adapter = adapt(loaded.timm_model, loaded.inputs)
    last = len(adapter.blocks) - 1
    if max(blocks) > last:
        raise InputError(f"{loaded.name} has no block {max(blocks)}: its blocks are 0 to {last}")
    hidden = HiddenStates.collect(adapter, images, nsamples, batch_size)
    found = []
    for index, block in enumerate(walk(adapter.blocks[: max(blocks) + 1], hidden)):
        if index not in blocks:
            continue
        inputs = input_statistics(hidden, block, level)
        for layer in block.linears:
            for i, weight in enumerate(layer.module.weight.detach().float().split(layer.heights)):
                name = f"{layer.name}[{i}]" if layer.parts > 1 else layer.name
                found.append(Matrix(name, weight, inputs[layer.name]))
    return found
