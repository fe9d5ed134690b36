"""Single weight matrices of a dense model and what their inputs are like, for benchmarks of solvers alone."""

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
    """One matrix; a fused qkv is three.

    Attributes:
        name: of its layer, with the number of the part where that has several.
        weight: [d_out, d_in], float32.
        inputs: moments of what the layer sees in the dense model.
    """

    name: str
    weight: Tensor
    inputs: InputStatistics


def dense_matrices(
    loaded: LoadedModel, images: Iterator[Tensor], nsamples: int, batch_size: int, blocks: Sequence[int], level: StatisticsLevel
) -> list[Matrix]:
    """All matrices of some blocks, with inputs from images that ran through the dense model.

    Args:
        loaded: the model.
        images: batches [b, 3, h, w].
        nsamples: how many images there may be.
        batch_size: how many images a block runs on at a time.
        blocks: which ones, counted from 0.
        level: "full" for whole second moments, "diagonal" for their diagonals.

    Raises:
        InputError: there is no such block, or an activation is not finite.
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
            for i, weight in enumerate(layer.module.weight.detach().float().chunk(layer.parts)):
                name = f"{layer.name}[{i}]" if layer.parts > 1 else layer.name
                found.append(Matrix(name, weight, inputs[layer.name]))
    return found
