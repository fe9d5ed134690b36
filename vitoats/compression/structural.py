"""Structural pruning of a whole model: heads and neurons are physically removed, which leaves smaller dense matrices.

There are two walks over the blocks. The first, on the dense model, scores all heads and neurons; one threshold for the whole
model then decides which of them stay. The second shrinks each block and refits the output layers by least squares, the
attention's first and then the MLP's behind it, on inputs from the pruned blocks before.

With int8 weights, a third walk rounds the layers that were left smaller, on inputs from the rounded blocks before.

Memory is that of ``vitoats.calibration`` with two copies of the hidden states: the second walk starts at the first block again.
"""

import dataclasses
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitoats.calibration.hidden_states import HiddenStates
from vitoats.calibration.moments import input_statistics
from vitoats.calibration.walk import walk
from vitoats.common import ranks
from vitoats.common.errors import InputError
from vitoats.common.kept_files import UnfitError
from vitoats.common.progress import StageProgress
from vitoats.compression.estimates import MemoryEstimate, WorkEstimate, estimate_memory
from vitoats.compression.job import CompressionJob
from vitoats.compression.layer import int8_linear
from vitoats.compression.outlook import Outlook, speed
from vitoats.compression.plan import plan_memory
from vitoats.compression.resume import BLOCK, NORM, RunFolder
from vitoats.compression.smoothing import smooth
from vitoats.format import factored
from vitoats.format.layers import replace_module
from vitoats.methods.numerical import compensated, cut
from vitoats.methods.registry import STRUCTURAL, StructuralMethod
from vitoats.methods.statistics import InputStatistics
from vitoats.models.blocks import Block, ModelAdapter
from vitoats.models.flops import count_flops
from vitoats.models.units import Units, find_units, keep_units, linear, why_not

log = logging.getLogger("vitoats")

SCORES, ROUNDED = "scores", "rounded"  # stages of a run, beside that of a finished block
UNKNOWN = "its heads or neurons are not known"  # why a layer stays unchanged
TRIAL_IMAGES = 2  # images used to check that a block's units can be removed


@dataclass(frozen=True)
class ModuleRow:
    """Figures of one attention or MLP.

    Attributes:
        name: dotted name in the model.
        kind: "heads", "groups" or "neurons".
        before: number of units before.
        kept: number of units kept.
        weights: number of weights left, without biases.
        relative_error: error of its output layer after the refit (``vitoats.methods.registry.output_error``), for the
            inputs X of the refit.
        seconds: time of the refit.
    """

    name: str
    kind: str
    before: int
    kept: int
    weights: int
    relative_error: float
    seconds: float


@dataclass(frozen=True)
class PruningReport:
    """The outcome of structural pruning.

    Attributes:
        modules: one row per attention or MLP, in order.
        skipped: (name, reason) of the layers that stay unchanged.
        compression: the share of these modules' weights that was removed.
        unit: the share of one unit of the largest kind; the compression is within half of it of the requested one.
        n_images: number of calibration images.
        seconds: total time without loading and probing.
    """

    modules: list[ModuleRow]
    skipped: list[tuple[str, str]]
    compression: float
    unit: float
    n_images: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def prune(
    adapter: ModelAdapter,
    job: CompressionJob,
    images: Iterator[Tensor],
    n_images: int,
    scratch: Path | None = None,
    progress: StageProgress = lambda *_: None,
    store: RunFolder | None = None,
) -> PruningReport:
    """Prunes a model in place.

    Args:
        adapter: the dense model.
        job: its method, config, weights and resources are used.
        images: batches of calibration images, as the model takes them.
        n_images: maximum number of these images.
        scratch: a folder with room for the hidden states, used if the estimate is above the memory limit.
        progress: called with blocks done in all walks, their number, and what is being done.
        store: keeps what is finished of each block, and returns that of an interrupted run.

    Raises:
        InputError: the model's heads or neurons cannot be removed, or too few would be left.
        RunError: there is no room for the hidden states.
    """
    start = time.perf_counter()
    method, config, resources = STRUCTURAL[job.method], job.config, job.resources
    spill_to = plan_memory(_memory(adapter, job, n_images), resources.memory_limit_bytes, scratch)
    n_blocks = len(adapter.blocks)
    steps = (3 if job.int8 else 2) * n_blocks
    progress(0, steps, "reading samples")
    hidden = HiddenStates.collect(adapter, images, n_images, resources.batch_size, spill_to, amp=job.recipe.amp)
    found, skipped = _removable(adapter, hidden.of_images(count=TRIAL_IMAGES))
    scores = _scores(
        adapter, hidden.copy(spill_to), found, method, config, store, lambda index, what: progress(index, steps, what)
    )
    flat = [units for modules in found for units in modules]
    try:
        kept = iter(cut(scores, [units.weights for units in flat], config))
    except InputError:  # other settings are needed, for which these scores are of no use
        if store:
            store.remove()
        raise

    again = hidden.copy(spill_to) if job.int8 else None
    rows = _prune_blocks(
        adapter, hidden, found, kept, config, store, lambda index, what: progress(n_blocks + index, steps, what)
    )
    if again is not None:
        _round_blocks(adapter, again, found, store, lambda index, what: progress(2 * n_blocks + index, steps, what))
    progress(steps, steps, "done")
    total = sum(units.count * units.weights for units in flat)
    return PruningReport(
        modules=rows,
        skipped=skipped,
        compression=1 - sum(row.weights for row in rows) / total,
        unit=max(units.weights for units in flat) / total,
        n_images=hidden.n_images,
        seconds=time.perf_counter() - start,
    )


def pruning_outlook(adapter: ModelAdapter, job: CompressionJob, n_images: int) -> Outlook:
    """The outlook on pruning a model, which counts all heads and neurons that are known, removable or not."""
    called = {layer.name: layer.module.weight.numel() for layer in adapter.linears}
    units = [units for block in adapter.blocks for units in find_units(adapter.model, block.name)]
    names = [name for found in units for name in (*found.inputs, found.output) if name in called]
    left = Counter(reason for _, reason in adapter.skipped) + Counter({UNKNOWN: len(called) - len(names)})
    walks = 6 if job.int8 else 4  # each runs a block twice
    widths = [linear(adapter.model, found.output).in_features for found in units]
    tokens = n_images * math.prod(adapter.blocks[0].shape_before) // adapter.blocks[0].shape_before[-1]
    work = WorkEstimate(
        walks * n_images * count_flops(adapter.model, adapter.inputs), 2.0 * tokens * sum(width**2 for width in widths), None
    )
    return Outlook(
        n_layers=len(names),
        n_blocks=len({block.name for block in adapter.blocks if any(n.startswith(block.name + ".") for n in names)}),
        weights=sum(called[name] for name in names),
        parameters=sum(parameter.numel() for parameter in adapter.model.parameters()),
        left_dense=dict(left),
        memory=_memory(adapter, job, n_images),
        work=work,
        seconds=work.total / speed(adapter),
    )


def _memory(adapter: ModelAdapter, job: CompressionJob, n_images: int) -> MemoryEstimate:
    """The memory that pruning takes, which keeps two copies of the hidden states."""
    estimate = estimate_memory(adapter, ranks.share(n_images), job.resources.batch_size, 0, job.config.compression, "full")
    return dataclasses.replace(estimate, hidden=2 * estimate.hidden)


def _prune_blocks(
    adapter: ModelAdapter,
    hidden: HiddenStates,
    found: list[list[Units]],
    kept: Iterator[Tensor],
    config: Any,
    store: RunFolder | None,
    progress: Callable[[int, str], None],
) -> list[ModuleRow]:
    """Shrinks all modules, and refits their output layers on inputs behind pruned blocks, or behind dense ones.

    Args:
        adapter: the model.
        hidden: the hidden states before the first block; advanced in place.
        found: the units of each block.
        kept: for each module in order, which of its n units stay, [n].
        config: the method's config.
        store: keeps the output layers of finished blocks.
        progress: called with the block's index and what is being done.
    """
    rows: list[ModuleRow] = []
    dense = config.compensation == "dense"
    blocks = adapter.blocks if dense else walk(adapter.blocks, hidden)
    for index, (block, modules) in enumerate(zip(blocks, found, strict=True)):
        masks = [next(kept) for _ in modules]
        finished = store.read(BLOCK, index, partial(_refitted, modules)) if store else None
        statistics: dict[str, InputStatistics] = {}
        progress(index, "resuming" if finished else "pruning")
        if dense:
            statistics = {} if finished else _output_inputs(hidden, block, modules)
            hidden.advance(block)  # before the block is changed
        if finished:
            tensors, of_block = finished
            for units, mask in zip(modules, masks, strict=True):
                output, inside = linear(adapter.model, units.output), f"{units.output}."
                keep_units(adapter.model, units, mask.nonzero().flatten().to(output.weight.device))
                output.load_state_dict({k.removeprefix(inside): x for k, x in tensors.items() if k.startswith(inside)})
        else:
            of_block = []
            for units, mask in zip(modules, masks, strict=True):
                moments = statistics if dense else _output_inputs(hidden, block, [units])
                of_block.append(_shrink(adapter.model, units, mask, moments, config))
            tensors = {
                f"{units.output}.{name}": x
                for units in modules
                for name, x in linear(adapter.model, units.output).state_dict().items()
            }
            if store:
                store.write(BLOCK, index, tensors, [asdict(row) for row in of_block])
        rows += of_block
    return rows


def _refitted(modules: list[Units], tensors: dict[str, Tensor], values: Any) -> tuple[dict[str, Tensor], list[ModuleRow]]:
    """The output layers and the figures of a pruned block that was kept."""
    rows = [ModuleRow(**value) for value in values]
    if [row.name for row in rows] != [units.module for units in modules]:
        raise UnfitError("it has other modules")
    return tensors, rows


def _round_blocks(
    adapter: ModelAdapter,
    hidden: HiddenStates,
    found: list[list[Units]],
    store: RunFolder | None,
    progress: Callable[[int, str], None],
) -> None:
    """Rounds the layers of all modules to int8, one after another, each for what it gets from those before.

    Args:
        adapter: the pruned model.
        hidden: the hidden states before the first block; advanced in place.
        found: the units of each block.
        store: keeps the layers of finished blocks, and their norms.
        progress: called with the block's index and what is being done.
    """
    for index, (block, modules) in enumerate(zip(walk(adapter.blocks, hidden), found, strict=True)):
        progress(index, "rounding")
        names = [name for units in modules for name in (*units.inputs, units.output)]
        finished = store.read(ROUNDED, index, partial(_rounded, adapter.model, names)) if store else None
        if finished:
            layers, norms = finished
            for name, norm in norms.items():
                adapter.model.get_parameter(name).data.copy_(norm)
            for name, layer in layers.items():
                replace_module(adapter.model, name, layer.to(hidden.device))
            continue
        norms = smooth(block, hidden, [name for units in modules for name in units.inputs])
        layers = {}
        for units in modules:
            for together in (units.inputs, (units.output,)):
                statistics = input_statistics(hidden, block, "full", list(together), int8=True)
                for name in together:
                    layers[name] = int8_linear(linear(adapter.model, name), statistics[name])
                    replace_module(adapter.model, name, layers[name])
        if store:
            tensors = {NORM + name: norm for name, norm in norms.items()}
            for name, layer in layers.items():
                tensors |= factored.pack(name, layer)
            store.write(ROUNDED, index, tensors, None)


def _rounded(
    model: nn.Module, names: list[str], tensors: dict[str, Tensor], _values: Any
) -> tuple[dict[str, factored.Layer], dict[str, Tensor]]:
    """The int8 layers, and the changed parameters of norms, of a rounded block that was kept."""
    sizes = {name: (linear(model, name).out_features, linear(model, name).in_features) for name in names}
    layers = {name: factored.unpack(name, tensors, [(d_out, 0)], d_in) for name, (d_out, d_in) in sizes.items()}
    return layers, {name.removeprefix(NORM): tensor for name, tensor in tensors.items() if name.startswith(NORM)}


@torch.inference_mode()
def _removable(adapter: ModelAdapter, hidden: Tensor) -> tuple[list[list[Units]], list[tuple[str, str]]]:
    """The removable units of each block, and (name, reason) of all layers that stay unchanged.

    Args:
        adapter: the model.
        hidden: a few hidden states before the first block.

    Raises:
        InputError: the model has no removable units.
    """
    called = {layer.name for layer in adapter.linears}
    found: list[list[Units]] = []
    reasons = dict.fromkeys(sorted(called), UNKNOWN)
    for block in adapter.blocks:
        found.append([])
        for units in find_units(adapter.model, block.name):
            layers = (*units.inputs, units.output)
            if not called.issuperset(layers) or linear(adapter.model, units.output).out_features != block.shape_after[-1]:
                continue  # e.g. an MLP that computes a position bias
            reason = why_not(block, units, hidden)
            if reason is None:
                found[-1].append(units)
                for layer in layers:
                    del reasons[layer]
            else:
                log.warning("%s stays as it is: %s", units.module, reason)
                reasons |= dict.fromkeys(layers, reason)
        hidden = block.run(hidden)
    if not any(found):
        raise InputError("the blocks have no attention or MLP whose heads or neurons can be removed: use another `method`")
    return found, adapter.skipped + list(reasons.items())


def _scores(
    adapter: ModelAdapter,
    hidden: HiddenStates,
    found: list[list[Units]],
    method: StructuralMethod,
    config: Any,
    store: RunFolder | None,
    progress: Callable[[int, str], None],
) -> list[Tensor]:
    """Scores all units of the model on its dense activations, module by module; advances ``hidden`` in place."""
    scores: list[Tensor] = []
    for index, (block, modules) in enumerate(zip(walk(adapter.blocks, hidden), found, strict=True)):
        progress(index, "scoring")
        of_block = store.read(SCORES, index, partial(_scored, modules)) if store else None
        if of_block is None:
            statistics = _output_inputs(hidden, block, modules)
            of_block = []
            for units in modules:
                weight = linear(adapter.model, units.output).weight.detach()
                moments = statistics[units.output].to(weight.device)
                of_block.append(method.score(weight, moments, units.width, config))
            if store:
                store.write(SCORES, index, {u.module: score for u, score in zip(modules, of_block, strict=True)}, None)
        scores += of_block
    return scores


def _scored(modules: list[Units], tensors: dict[str, Tensor], _values: Any) -> list[Tensor]:
    """The scores of a block that were kept."""
    return [tensors[units.module] for units in modules]


def _output_inputs(hidden: HiddenStates, block: Block, modules: list[Units]) -> dict[str, InputStatistics]:
    """Full moments of the inputs of these units' output layers."""
    return input_statistics(hidden, block, "full", [units.output for units in modules])


@torch.no_grad()
def _shrink(model: nn.Module, units: Units, mask: Tensor, statistics: dict[str, InputStatistics], config: Any) -> ModuleRow:
    """Physically removes the units that ``mask`` [n] does not mark, and refits the output layer."""
    start = time.perf_counter()
    output = linear(model, units.output)
    device = output.weight.device
    kept = mask.nonzero().flatten().to(device)
    moments = statistics[units.output].to(device)
    weight, bias, error = compensated(output.weight, output.bias, moments, units.columns(kept), config)
    keep_units(model, units, kept)
    output.weight.copy_(weight)
    if bias is not None:
        output.bias.copy_(bias)
    seconds = time.perf_counter() - start
    return ModuleRow(units.module, units.kind, units.count, len(kept), len(kept) * units.weights, error, seconds)
