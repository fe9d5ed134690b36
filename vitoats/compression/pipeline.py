"""Compresses a whole model block by block, with inputs from the compressed blocks before each layer."""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vitoats.calibration.hidden_states import HiddenStates
from vitoats.calibration.targets import Calibration, SymmetricCalibration, calibration_for
from vitoats.calibration.walk import walk
from vitoats.common import ranks
from vitoats.common.memory import return_freed_memory
from vitoats.common.progress import StageProgress
from vitoats.compression.layer import LayerRow, compress_layer, packed_layer, unpacked_layer
from vitoats.compression.plan import CompressionPlan
from vitoats.compression.resume import BlockStore
from vitoats.compression.smoothing import smooth
from vitoats.format.factored import Layer, rounded
from vitoats.format.layers import replace_module
from vitoats.models.blocks import Block, LinearLayer


@dataclass(frozen=True)
class CompressionReport:
    """The outcome of a compression.

    Attributes:
        layers: one row per compressed layer, in order.
        skipped: (name, reason) of the layers that stay dense.
        compression: the share of weights actually removed from the compressed layers.
        n_images: number of calibration images.
        seconds: total time without loading and planning.
    """

    layers: list[LayerRow]
    skipped: list[tuple[str, str]]
    compression: float
    n_images: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def compress(
    plan: CompressionPlan,
    images: Iterator[Tensor],
    state: BlockStore | None = None,
    progress: StageProgress = lambda *_: None,
) -> CompressionReport:
    """Compresses a model in place.

    Args:
        plan: what to compress, and how (``plan.plan_compression``).
        images: batches of calibration images, as the model takes them.
        state: stores finished blocks, and returns those of an interrupted run.
        progress: called with blocks done, number of blocks, and what is being done.

    Raises:
        InputError: weights or activations are not finite.
        RunError: there is no room for the hidden states.
    """
    start = time.perf_counter()
    return_freed_memory()
    progress(0, len(plan.adapter.blocks), "reading samples")
    hidden = HiddenStates.collect(
        plan.adapter, images, plan.n_images, plan.batch_size, plan.spill_to, plan.storage, plan.recipe.amp
    )
    rows = _compress_blocks(plan, hidden, state, progress)
    total = sum(row.d_out * row.d_in for row in rows)
    kept = sum(row.kept_parameters for row in rows)
    return CompressionReport(rows, plan.adapter.skipped, 1 - kept / total, hidden.n_images, time.perf_counter() - start)


def _compress_blocks(
    plan: CompressionPlan, hidden: HiddenStates, state: BlockStore | None, progress: StageProgress
) -> list[LayerRow]:
    """Compresses the blocks in place, one after another; advances ``hidden`` in place, and returns all layers' figures."""
    rows: list[LayerRow] = []
    blocks = plan.adapter.blocks
    calibration = calibration_for(plan.recipe.target, hidden, plan.level, plan.keep, plan.int8)
    for index, block in enumerate(walk(blocks, calibration)):
        names = [layer.name for layer in block.linears]
        norms = smooth(block, hidden, names) if plan.int8 and names else {}
        finished = state.load(index, names) if state else None
        calibration.enter(block, [] if finished else block.linears)
        return_freed_memory()
        if finished:
            progress(index, len(blocks), "resuming")
            layers, block_rows, norms = finished
            for name, norm in norms.items():
                block.model.get_parameter(name).data.copy_(norm)
            for name, layer in layers.items():
                replace_module(block.model, name, layer.to(hidden.device))
        else:
            layers, block_rows = _compress_block(plan, block, calibration, partial(progress, index, len(blocks)))
            if state:
                state.save(index, layers, block_rows, norms)
                ranks.wait_for_all()
        if plan.disk and state:
            plan.disk.compressed(block.name, partial(state.finished, index, names))
        rows += block_rows
        if index + 1 < len(blocks):
            progress(index, len(blocks), "propagating")
    progress(len(blocks), len(blocks), "done")
    return rows


def _compress_block(
    plan: CompressionPlan, block: Block, calibration: Calibration, progress: Callable[[str], None]
) -> tuple[dict[str, Layer], list[LayerRow]]:
    """Compresses the layers of a block in place; each is measured after those before it have been replaced.

    Where all are measured at once, several processes share them out; else they share the rows of one layer.
    """
    layers: dict[str, Layer] = {}
    rows = []
    progress("calibrating")

    def compressed_layer(layer: LinearLayer) -> tuple[Layer, LayerRow]:
        statistics, error = calibration.measure(layer)
        progress(layer.name)
        config, refit_bias = plan.configs[layer.name], plan.recipe.refit_bias
        return compress_layer(layer, statistics, error, plan.method, config, refit_bias, plan.int8)

    groups = [[layer] for layer in block.linears]
    if plan.recipe.target == "block" and isinstance(calibration, SymmetricCalibration) and block.linears:
        calibration.measure_all()
        groups = [block.linears]
    for group in groups:
        costs = [_cost(plan.configs[layer.name], layer) for layer in group]
        made = ranks.shared_out(group, costs, compressed_layer, packed_layer, unpacked_layer)
        for layer, (compressed, row) in zip(group, made, strict=True):
            compressed = rounded(compressed, plan.types.get(f"{layer.name}.weight", torch.float32))
            replace_module(block.model, layer.name, compressed.to(calibration.hidden.device))
            calibration.finish(layer)
            layers[layer.name] = compressed
            rows.append(row)
            progress("calibrating")
    return layers, rows


def _cost(config: Any, layer: LinearLayer) -> float:
    """Multiply-adds of a layer's solver; if the config does not know them, the layer's share of those of a product with H."""
    d_in = layer.module.in_features
    if hasattr(config, "multiply_adds"):
        return sum(config.multiply_adds(height, d_in) for height in layer.heights)
    return layer.module.out_features * d_in**2
