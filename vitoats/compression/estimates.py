"""Estimates of the memory and arithmetic that a compression will take, before it starts.

Memory does not grow with depth:

    what the process has resident           Python, torch, timm and data, measured; and the code that is yet to be read in
  + n * tokens * width * 4 bytes            hidden states, in memory or in a memory-mapped file; if a block changes their
                                            shape, those before and after it; the largest counts; twice for targets from the
                                            dense path
  + n * tokens * (10 * width) * 4           for targets from the dense path, if there is room: the inputs and outputs of a
                                            block's layers, to compute little twice (calibration.paths): width for each input
                                            of qkv, proj and fc1, 4 * width for fc2, and 3 * width for residual stream and
                                            outputs
    or, if it is more, what budgets take before: hidden states of up to 96 images or 32 windows, and of a language model the
                                            gradients at 4,096 tokens between all blocks
  + 8 * (sum of d_in^2 over a block's linear layers)   full second moments, by which errors are measured; for targets from the
                                            dense path, one at a time, with 8 * (largest weight matrix) of cross moments
  + the larger of
        batch * (tokens * 4 * 4 * width) * 4    one block running on one batch: up to four tensors of the MLP's width; twice
                                            for targets from the dense path, because both paths' inputs are compared
        + 12 * (largest d_in^2)             a batch's second moment
        9 * (largest weight matrix) * 4     the solver's buffers; if it needs full second moments, 104 * (largest weight
                                            matrix), 32 * (largest d_in^2), and 32 MB for the rows that are refitted at once
  + the model itself and its low-rank factors (S, stored with its zeros, replaces the dense weight); of a language model whose
    blocks are read from disk, what lies outside of them, and 2 blocks, or 5 for targets from the dense path

While saving, a packed copy of the compressed weights replaces all but the process and the model: 4 bytes per kept parameter (or
2, if the model's folder has such a type) and one bit per weight; of a model on disk, that of one file. While the gradients of a
language model's predictions are found, a part of the logits, four times, replaces the statistics and the solver.

Arithmetic is counted in multiply-adds, as in fvcore, and is an upper bound: ADMM ends once supports settle, and half of a large
second moment is copied.
"""

import math
from dataclasses import dataclass
from typing import Any

from torch import nn

from vitoats.calibration.moments import ERROR_TOKENS
from vitoats.calibration.targets import token_stride
from vitoats.common.memory import resident_memory
from vitoats.methods.hessian import REFIT_BYTES
from vitoats.methods.statistics import StatisticsLevel
from vitoats.models.blocks import Block, ModelAdapter
from vitoats.models.flops import count_flops
from vitoats.models.on_disk import largest_on_disk, size_in_memory

PROCESS_BYTES = 450_000_000  # resident once torch and timm are imported, where the system does not say
CODE_BYTES = 80_000_000  # of libraries, and what they keep, resident once it has run
BLOCKS_HELD = {1: 2, 2: 5}  # of a model on disk, by the number of paths: as read and as compressed; a dense copy, in float64
LARGEST_FILE = 5 * 10**9  # of a folder: loading.language_checkpoint
MLP_TENSORS = 16  # a running block: four tensors of four times the width
MOMENT_BUFFERS = 3  # float32 matrices [d_in, d_in] beside the sum: a batch's second moment, and it in float64
SOLVER_BUFFERS = 9
FULL_SOLVER_BUFFERS = 26  # the same if a method needs the full second moment: 13 matrices, in float64
HESSIAN_BUFFERS = 4  # float64 matrices [d_in, d_in] that such a solver holds at once: damped H, its factors, eigenvectors
KEPT_PASSES = 2.5  # dense and compressed, plus attention, which runs once more than its layers


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that a compression will take, by purpose."""

    process: int
    model: int
    hidden: int
    kept: int
    block: int
    statistics: int
    solver: int
    saving: int
    budgets: int = 0
    predictions: int = 0

    @property
    def total(self) -> int:
        """The peak: while compressing, saving, or finding gradients of a language model's predictions."""
        at_work = max(self.hidden + self.kept, self.budgets) + self.statistics + max(self.block, self.solver)
        return self.process + self.model + max(at_work, self.saving, self.budgets + self.predictions)

    def __str__(self) -> str:
        def gb(n: int) -> str:
            return f"{n / 1e9:.2f} GB"

        budgets = f" (or, for budgets, {gb(self.budgets)})" if self.budgets > self.hidden + self.kept else ""
        predictions = f"; gradients of predictions {gb(self.budgets + self.predictions)}" if self.predictions else ""
        return (
            f"{gb(self.total)} = Python, torch and data {gb(self.process)} + model {gb(self.model)} + the larger of: hidden "
            f"states {gb(self.hidden)} + kept of a block {gb(self.kept)}{budgets} + second moments {gb(self.statistics)} + "
            f"the larger of one block at work {gb(self.block)} and solver {gb(self.solver)}; saving {gb(self.saving)}"
            f"{predictions}"
        )


def estimate_memory(
    adapter: ModelAdapter,
    nsamples: int,
    batch_size: int,
    factors: int,
    compression: float,
    level: StatisticsLevel = "diagonal",
    paths: int = 1,
    weight_bytes: int = 4,
) -> MemoryEstimate:
    """The memory that compressing with ``nsamples`` images will take; the formula is in this module's docstring.

    Args:
        adapter: the model.
        nsamples: calibration images.
        batch_size: images at a time.
        factors: parameters of all low-rank factors.
        compression: share of the weights that is removed.
        level: which statistics of a layer's input are collected.
        paths: 2 if the dense model's hidden states are kept as well as the compressed one's.
        weight_bytes: bytes in which a weight is stored.
    """
    before = [math.prod(block.shape_before) for block in adapter.blocks]
    after = [math.prod(block.shape_after) for block in adapter.blocks]
    changing = [b.shape_before != b.shape_after for b in adapter.blocks[:-1]]  # both are held, except behind the last
    held = max([*before, *(x + y for x, y, changes in zip(before, after, changing, strict=False) if changes)])
    sizes = [layer.module.weight.numel() for layer in adapter.linears]
    widths = [[layer.module.in_features for layer in block.linears] for block in adapter.blocks]
    kept = max(elements * (sum(block) / block[0] + 3) for elements, block in zip(before, widths, strict=True) if block)
    widest = max(width for block in widths for width in block)
    statistics = 8 * max(sum(width**2 for width in block) for block in widths)
    if paths > 1:
        statistics = 8 * (widest**2 + max(sizes))
    solver = SOLVER_BUFFERS * 4 * max(sizes)
    if level == "full":
        solver = FULL_SOLVER_BUFFERS * 4 * max(sizes) + HESSIAN_BUFFERS * 8 * widest**2 + REFIT_BYTES
    on_disk, saving = largest_on_disk(adapter.model), round(sum(sizes) * (weight_bytes * (1 - compression) + 1 / 8))
    return MemoryEstimate(
        process=_process_bytes(adapter.model),
        model=size_in_memory(adapter.model) + (BLOCKS_HELD[paths] * on_disk if on_disk else factors * 4),
        hidden=paths * nsamples * held * 4,
        kept=round(nsamples * kept * 4) if paths > 1 else 0,
        block=paths * min(batch_size, nsamples) * max(*before, *after) * MLP_TENSORS * 4 + MOMENT_BUFFERS * 4 * widest**2,
        statistics=statistics,
        solver=solver,
        saving=min(saving, LARGEST_FILE) if on_disk else saving,
    )


def _process_bytes(model: nn.Module) -> int:
    """Bytes of the process without the model."""
    resident = resident_memory()
    return PROCESS_BYTES if resident is None else max(0, resident - size_in_memory(model)) + CODE_BYTES


@dataclass(frozen=True)
class WorkEstimate:
    """Multiply-adds that a compression takes at most, by purpose; solver is None if the method does not report it."""

    passes: float
    statistics: float
    solver: float | None
    budgets: float = 0.0

    @property
    def total(self) -> float:
        """What is known of it, in total."""
        return self.passes + self.statistics + (self.solver or 0) + self.budgets

    def __str__(self) -> str:
        parts = {"passes": self.passes, "second moments": self.statistics, "solver": self.solver}
        parts |= {"measuring budgets": self.budgets} if self.budgets else {}
        said = " + ".join(f"{name} {n / 1e12:.3g}" for name, n in parts.items() if n is not None)
        return f"at most {self.total / 1e12:.3g} T multiply-adds = {said}" + (
            "" if self.solver is not None else ", the solver apart"
        )


def estimate_work(
    adapter: ModelAdapter,
    configs: dict[str, Any],
    nsamples: int,
    level: StatisticsLevel,
    passes: float,
    two_paths: bool,
) -> WorkEstimate:
    """The arithmetic that compressing with ``nsamples`` images will take, without measuring budgets.

    Args:
        adapter: the model; its blocks have only the layers to compress.
        configs: the method's configs, by layer name; their ``multiply_adds(d_out, d_in)``, if any, gives the solver's count.
        nsamples: calibration images.
        level: which statistics of a layer's input are collected.
        passes: how often all blocks run over all images.
        two_paths: whether layers are measured against the dense path, which needs cross moments, too.
    """
    statistics, solver = 0, 0
    for block in adapter.blocks:
        for layer in block.linears:
            module = layer.module
            tokens = nsamples * math.prod(block.shape_before) // block.linears[0].module.in_features
            if level == "full" and two_paths:
                statistics += tokens // token_stride(tokens, module.in_features) * 2 * module.in_features**2
            else:
                stride = 1 if level == "full" else max(1, tokens // ERROR_TOKENS)
                statistics += tokens // stride * module.in_features**2
            if hasattr(configs[layer.name], "multiply_adds"):
                solver += sum(configs[layer.name].multiply_adds(height, module.in_features) for height in layer.heights)
    return WorkEstimate(passes * nsamples * count_flops(adapter.model, adapter.inputs), statistics, solver or None)


def count_passes(blocks: list[Block], target: str, keep: bool) -> float:
    """How often all blocks run over all images; a part of a block counts by its share of the weights.

    Args:
        blocks: the blocks, with the layers to compress.
        target: the reconstruction target (vitoats.calibration.targets).
        keep: whether intermediate results are kept instead of computed again.
    """
    most = max(len(block.linears) for block in blocks)
    if target in ("block", "sequential"):
        return 2.0 if target == "block" else most + 1.0
    if keep:
        return KEPT_PASSES
    ran, total = 0, 0
    for block in blocks:
        sizes = [layer.module.weight.numel() for layer in block.linears]
        total += sum(sizes)
        ran += sum(sizes) + sum(sum(sizes[:i]) for i in range(len(sizes)))
    return 2 * ran / total
