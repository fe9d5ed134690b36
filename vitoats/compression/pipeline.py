"""Compresses a whole model block by block, with inputs from the compressed blocks before each layer."""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vitoats.calibration.hidden_states import HiddenStates
from vitoats.calibration.targets import Calibration, Target, calibration_for
from vitoats.calibration.walk import walk
from vitoats.common.memory import return_freed_memory
from vitoats.compression.layer import LayerRow, compress_layer
from vitoats.compression.plan import Budget, CompressionPlan, plan_compression
from vitoats.compression.resume import BlockStore
from vitoats.compression.smoothing import smooth
from vitoats.format.factored import Layer
from vitoats.format.layers import replace_module
from vitoats.models.adapter import adapt
from vitoats.models.blocks import Block
from vitoats.models.inputs import ImageInputs

Progress = Callable[[int, int, str], None]  # block, number of blocks, what is being done


@dataclass(frozen=True)
class CompressionReport:
    """The outcome of a compression.

    Attributes:
        layers: one row per compressed layer, in order.
        skipped: (name, reason) of the layers that stay dense.
        compression: the share of weights actually removed from the compressed layers.
        n_images: number of calibration images.
        seconds: total time without loading.
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
    model: nn.Module,
    images: Iterator[Tensor],
    *,
    method: str,
    config: Any,
    inputs: ImageInputs,
    nsamples: int,
    batch_size: int = 64,
    fused_qkv: bool = False,
    target: Target = "block",
    refit_bias: bool = False,
    int8: bool = False,
    budgets: dict[str, Budget] | None = None,
    memory_limit: float | None = None,
    scratch: Path | None = None,
    state: BlockStore | None = None,
    progress: Progress = lambda *_: None,
) -> CompressionReport:
    """Compresses a model in place.

    Args:
        model: a vision transformer in eval mode, on the device where the work is done.
        images: batches of calibration images, as ``inputs`` describes them.
        method: a registered method's name, or ./file.py:name.
        config: that method's config.
        inputs: the kind of images that the model takes.
        nsamples: maximum number of images that ``images`` yields.
        batch_size: how many images a block runs on at a time.
        fused_qkv: decompose a fused qkv as one matrix; by default q, k and v separately, as in the paper.
        target: the reconstruction target (``vitoats.calibration.targets``).
        refit_bias: let the bias absorb the mean of a layer's lost output, so its weights only have to fit the variation.
        int8: round the weights of the compressed layers to int8; these layers quantize their inputs.
        budgets: settings of single layers by name, which override the config's.
        memory_limit: bytes; if the estimate is above it, hidden states go to a file in ``scratch`` instead.
        scratch: a folder with room for that file.
        state: stores finished blocks, and returns those of an interrupted run.
        progress: called with what is being done.

    Raises:
        InputError: the model has no chain of blocks, or weights or activations are not finite.
        RunError: there is no room for the hidden states.
    """
    start = time.perf_counter()
    adapter = adapt(model, inputs)
    plan = plan_compression(
        adapter,
        method=method,
        config=config,
        nsamples=nsamples,
        batch_size=batch_size,
        fused_qkv=fused_qkv,
        target=target,
        refit_bias=refit_bias,
        int8=int8,
        budgets=budgets,
        memory_limit=memory_limit,
        scratch=scratch,
    )
    return_freed_memory()
    progress(0, len(plan.blocks), "reading images")
    hidden = HiddenStates.collect(adapter, images, nsamples, batch_size, plan.spill_to)
    rows = compress_blocks(plan, hidden, state, progress)
    total = sum(row.d_out * row.d_in for row in rows)
    kept = sum(row.kept_parameters for row in rows)
    return CompressionReport(rows, plan.skipped, 1 - kept / total, hidden.n_images, time.perf_counter() - start)


def compress_blocks(
    plan: CompressionPlan, hidden: HiddenStates, state: BlockStore | None, progress: Progress
) -> list[LayerRow]:
    """Compresses the blocks of a model in place, one after another.

    Args:
        plan: what to compress, and how.
        hidden: the hidden states before the first block; advanced in place.
        state: stores finished blocks, and returns those of an interrupted run.
        progress: called with what is being done.

    Returns:
        the figures of all compressed layers, in order.
    """
    rows: list[LayerRow] = []
    n_blocks = len(plan.blocks)
    calibration = calibration_for(plan.target, hidden, plan.level, plan.keep, plan.int8)
    for index, block in enumerate(walk(plan.blocks, calibration)):
        names = [layer.name for layer in block.linears]
        norms = smooth(block, hidden, names) if plan.int8 and names else {}
        finished = state.load(index, names) if state else None
        calibration.enter(block, [] if finished else block.linears)
        return_freed_memory()
        if finished:
            progress(index, n_blocks, "resuming")
            layers, block_rows, norms = finished
            for name, norm in norms.items():
                block.model.get_parameter(name).data.copy_(norm)
            for name, layer in layers.items():
                replace_module(block.model, name, layer.to(hidden.device))
        else:
            layers, block_rows = _compress_block(plan, block, calibration, partial(progress, index, n_blocks))
            if state:
                state.save(index, layers, block_rows, norms)
        rows += block_rows
        if index + 1 < n_blocks:
            progress(index, n_blocks, "propagating")
    progress(n_blocks, n_blocks, "done")
    return rows


def _compress_block(
    plan: CompressionPlan, block: Block, calibration: Calibration, progress: Callable[[str], None]
) -> tuple[dict[str, Layer], list[LayerRow]]:
    """Compresses the layers of a block in place; each is measured after those before it have been replaced."""
    layers: dict[str, Layer] = {}
    rows = []
    progress("calibrating")
    for layer in block.linears:
        statistics, error = calibration.measure(layer)
        progress(layer.name)
        config = plan.configs[layer.name]
        compressed, row = compress_layer(layer, statistics, error, plan.method, config, plan.refit_bias, plan.int8)
        replace_module(block.model, layer.name, compressed.to(calibration.hidden.device))
        calibration.finish(layer)
        layers[layer.name] = compressed
        rows.append(row)
        progress("calibrating")
    return layers, rows
