"""Structural pruning of a whole model: heads and neurons go for real, so that smaller dense matrices are left.

Two walks over the blocks. The first, on the dense model, scores all heads and neurons; one threshold over the whole model then
says which of them stay. The second makes each block smaller: what is left of an output layer is refitted by least squares, the
attention's first and then, behind it, the MLP's, on the inputs that the pruned blocks before it make.

Memory is that of ``vitoats.calibration`` with the hidden states twice: the second walk starts from the images' first again.
"""

import dataclasses
import logging
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitoats.calibration.hidden_states import HiddenStates
from vitoats.calibration.moments import input_statistics
from vitoats.calibration.walk import walk
from vitoats.common.errors import InputError
from vitoats.compression.estimates import estimate_memory
from vitoats.compression.pipeline import Progress
from vitoats.compression.plan import plan_memory
from vitoats.methods.numerical import compensated, cut
from vitoats.methods.registry import STRUCTURAL, StructuralMethod
from vitoats.methods.statistics import InputStatistics
from vitoats.models.adapter import adapt
from vitoats.models.blocks import Block, ModelAdapter
from vitoats.models.inputs import ImageInputs
from vitoats.models.units import Units, find_units, keep_units, linear, why_not

log = logging.getLogger("vitoats")

TRIAL_IMAGES = 2  # on which a block has to prove that its units can be removed


@dataclass(frozen=True)
class ModuleRow:
    """Figures of one attention or MLP.

    Attributes:
        name: dotted name in the model.
        kind: "heads" or "neurons".
        before: how many units it had.
        kept: how many it has.
        weights: elements of its weight matrices now, biases apart.
        relative_error: of its output layer with the refit, ||X (W - W')^T||_F / ||X W^T||_F, bias included, for the inputs X
            that the refit saw.
        seconds: of the refit.
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
    """What structural pruning did.

    Attributes:
        modules: one row an attention or MLP, in order.
        skipped: (name, reason) of the layers that stay as they were.
        compression: the share of the weights of these modules that is gone.
        unit: the share that one unit of the largest kind is: the threshold hits what was asked for within half of it.
        n_images: how many images calibrated it.
        seconds: in all, loading apart.
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
    model: nn.Module,
    images: Iterator[Tensor],
    *,
    method: str,
    config: Any,
    inputs: ImageInputs,
    nsamples: int,
    batch_size: int = 64,
    memory_limit: float | None = None,
    scratch: Path | None = None,
    progress: Progress = lambda *_: None,
) -> PruningReport:
    """Prunes a model in place.

    Args:
        model: a vision transformer in eval mode, on the device where the work is done.
        images: batches of calibration images, as ``inputs`` describes them.
        method: a structural method's name.
        config: that method's config.
        inputs: what the model takes.
        nsamples: how many images ``images`` yields at most.
        batch_size: how many images a block runs on at a time.
        memory_limit: bytes; if the estimate is above it, hidden states go to files in ``scratch`` instead.
        scratch: a folder with room for these files.
        progress: told what is being done.

    Raises:
        InputError: the model has no chain of blocks, its heads or neurons cannot be removed, or too few would be left.
        RunError: no room for the hidden states.
    """
    start = time.perf_counter()
    solver = STRUCTURAL[method]
    adapter = adapt(model, inputs)
    estimate = estimate_memory(adapter, nsamples, batch_size, 0, config.compression, "full")
    spill_to = plan_memory(dataclasses.replace(estimate, hidden=2 * estimate.hidden), memory_limit, scratch)
    n_blocks = len(adapter.blocks)
    progress(0, 2 * n_blocks, "reading images")
    hidden = HiddenStates.collect(adapter, images, nsamples, batch_size, spill_to)
    found, skipped = _removable(adapter, hidden.values[:TRIAL_IMAGES].to(hidden.device))
    scores = _scores(adapter, hidden.copy(spill_to), found, solver, config, progress)
    flat = [units for modules in found for units in modules]
    kept = iter(cut(scores, [units.weights for units in flat], config))

    rows = _prune_blocks(adapter, hidden, found, kept, config, progress)
    progress(2 * n_blocks, 2 * n_blocks, "done")
    total = sum(units.count * units.weights for units in flat)
    return PruningReport(
        modules=rows,
        skipped=skipped,
        compression=1 - sum(row.weights for row in rows) / total,
        unit=max(units.weights for units in flat) / total,
        n_images=hidden.n_images,
        seconds=time.perf_counter() - start,
    )


def _prune_blocks(
    adapter: ModelAdapter,
    hidden: HiddenStates,
    found: list[list[Units]],
    kept: Iterator[Tensor],
    config: Any,
    progress: Progress,
) -> list[ModuleRow]:
    """Makes all modules smaller, and refits their output layers on inputs behind pruned blocks, or behind dense ones.

    Args:
        adapter: the model.
        hidden: the images before the first block; used up.
        found: the units of each block.
        kept: which units of each module stay, [n] in order.
        config: of the method.
        progress: told what is being done.
    """
    n_blocks = len(adapter.blocks)
    rows: list[ModuleRow] = []
    if config.compensation == "dense":
        for index, (block, modules) in enumerate(zip(adapter.blocks, found, strict=True)):
            progress(n_blocks + index, 2 * n_blocks, "pruning")
            statistics = _output_inputs(hidden, block, modules)
            hidden.advance(block)  # before it is touched
            rows += [_shrink(adapter.model, units, next(kept), statistics, config) for units in modules]
        return rows
    for index, (block, modules) in enumerate(zip(walk(adapter.blocks, hidden), found, strict=True)):
        progress(n_blocks + index, 2 * n_blocks, "pruning")
        for units in modules:
            statistics = _output_inputs(hidden, block, [units])
            rows.append(_shrink(adapter.model, units, next(kept), statistics, config))
    return rows


def _removable(adapter: ModelAdapter, hidden: Tensor) -> tuple[list[list[Units]], list[tuple[str, str]]]:
    """The units of each block that can be removed, and (name, reason) of all layers that stay as they are.

    Args:
        adapter: the model.
        hidden: a few hidden states before the first block.

    Raises:
        InputError: there are none at all.
    """
    called = {layer.name for layer in adapter.linears}
    found: list[list[Units]] = []
    reasons = dict.fromkeys(sorted(called), "its heads or neurons are not known")
    for block in adapter.blocks:
        found.append([])
        for units in find_units(adapter.model, block.name):
            layers = (*units.inputs, units.output)
            if not called.issuperset(layers) or linear(adapter.model, units.output).out_features != block.shape_after[-1]:
                continue  # (an MLP that makes a position bias, say)
            reason = why_not(block, units, hidden)
            if reason is None:
                found[-1].append(units)
                for layer in layers:
                    del reasons[layer]
            else:
                log.warning("%s stays as it is: %s", units.module, reason)
                reasons |= dict.fromkeys(layers, reason)
    if not any(found):
        raise InputError("the blocks have no attention or MLP whose heads or neurons can be removed: use another `method`")
    return found, adapter.skipped + list(reasons.items())


def _scores(
    adapter: ModelAdapter,
    hidden: HiddenStates,
    found: list[list[Units]],
    method: StructuralMethod,
    config: Any,
    progress: Progress,
) -> list[Tensor]:
    """Scores all units of the model on its dense activations, module by module; ``hidden`` is used up."""
    scores = []
    for index, (block, modules) in enumerate(zip(walk(adapter.blocks, hidden), found, strict=True)):
        progress(index, 2 * len(found), "scoring")
        statistics = _output_inputs(hidden, block, modules)
        for units in modules:
            weight = linear(adapter.model, units.output).weight.detach()
            moments = statistics[units.output].to(weight.device)
            scores.append(method.score(weight, moments, units.width, config))
    return scores


def _output_inputs(hidden: HiddenStates, block: Block, modules: list[Units]) -> dict[str, InputStatistics]:
    """Full moments of what the output layers of these units read."""
    return input_statistics(hidden, block, "full", [units.output for units in modules])


@torch.no_grad()
def _shrink(model: nn.Module, units: Units, mask: Tensor, statistics: dict[str, InputStatistics], config: Any) -> ModuleRow:
    """Removes the units that ``mask`` [n] does not mark for real, and refits the output layer."""
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
