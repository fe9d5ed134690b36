"""What a compression covers and takes, said before it starts: layers, memory, multiply-adds and time."""

import math
import time
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import torch

from vitoats.compression.budgets import budgets_work
from vitoats.compression.estimates import MemoryEstimate, WorkEstimate
from vitoats.compression.job import CompressionJob
from vitoats.compression.plan import CompressionPlan
from vitoats.models.blocks import ModelAdapter
from vitoats.models.flops import count_flops
from vitoats.models.inputs import TextInputs
from vitoats.models.on_disk import held

TRIAL_IMAGES, TRIALS = 4, 4  # that the model runs on, and how often, to estimate the time


@dataclass(frozen=True)
class Outlook:
    """The outlook on a compression.

    Attributes:
        n_layers: linear layers to compress.
        n_blocks: blocks that they lie in, or modules between two blocks.
        weights: number of their weights.
        parameters: number of all parameters of the model.
        left_dense: how many layers stay dense, by reason.
        memory: the memory it takes.
        work: the arithmetic it takes at most.
        seconds: how long that takes at the speed at which the model ran on a few images.
    """

    n_layers: int
    n_blocks: int
    weights: int
    parameters: int
    left_dense: dict[str, int]
    memory: MemoryEstimate
    work: WorkEstimate
    seconds: float

    def lines(self) -> list[str]:
        """The outlook in words, a line for each of its parts."""
        share = self.weights / self.parameters
        left = ", ".join(f"{n} ({reason})" for reason, n in self.left_dense.items())
        return [
            f"coverage: {self.n_layers} linear layers in {self.n_blocks} blocks, {share:.1%} of {self.parameters / 1e6:.4g} M "
            f"parameters; {f'left dense: {left}' if left else 'none is left dense'}",
            f"memory: {self.memory}",
            f"arithmetic: {self.work}",
            f"time: at most about {_duration(self.seconds)} on this machine",
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "n_layers": self.n_layers,
            "n_blocks": self.n_blocks,
            "coverage": round(self.weights / self.parameters, 4),
            "left_dense": self.left_dense,
            "memory_gb": round(self.memory.total / 1e9, 3),
            "multiply_adds": round(self.work.total),
            "seconds_at_most": round(self.seconds, 1),
        }


def outlook(plan: CompressionPlan, job: CompressionJob) -> Outlook:
    """The outlook on a plan, in which no layer has a budget of its own yet."""
    adapter = plan.adapter
    work = replace(plan.work, budgets=budgets_work(job, adapter, plan.n_images))
    return Outlook(
        n_layers=len(adapter.linears),
        n_blocks=sum(bool(block.linears) for block in adapter.blocks),
        weights=sum(layer.module.weight.numel() for layer in adapter.linears),
        parameters=sum(parameter.numel() for parameter in adapter.model.parameters()),
        left_dense=dict(Counter(reason for _, reason in adapter.skipped)),
        memory=plan.memory,
        work=work,
        seconds=work.total / speed(adapter),
    )


@torch.inference_mode()
def speed(adapter: ModelAdapter) -> float:
    """Multiply-adds per second of the model, in the fastest of a few runs: other work on the machine makes some slower.

    Of a language model, one block is timed on one window.
    """
    if isinstance(adapter.inputs, TextInputs):
        return _speed_of_block(adapter)
    images = adapter.inputs.noise(TRIAL_IMAGES).to(adapter.device)

    def run() -> float:
        start = time.perf_counter()
        adapter.inputs.call(adapter.model, images).cpu()
        return time.perf_counter() - start

    return TRIAL_IMAGES * count_flops(adapter.model, adapter.inputs) / min(run() for _ in range(TRIALS))


def _speed_of_block(adapter: ModelAdapter) -> float:
    block = next(block for block in adapter.blocks if block.linears)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, *block.shape_before, generator=generator).to(adapter.device)
    tokens = math.prod(block.shape_before) // block.shape_before[-1]

    def run() -> float:
        start = time.perf_counter()
        block.run(hidden).cpu()
        return time.perf_counter() - start

    with held(block.module):
        return tokens * sum(layer.module.weight.numel() for layer in block.linears) / min(run() for _ in range(TRIALS))


def _duration(seconds: float) -> str:
    for unit, length in (("hours", 3600), ("minutes", 60)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.2g} {unit}"
    return f"{max(1, seconds):.0f} s"
