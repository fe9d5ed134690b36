"""The plan of a compression, made before it starts: which layers, with which settings, and in how much memory."""

import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from vitoats.allocation.constraint import Budgets
from vitoats.calibration.targets import FROM_DENSE_PATH
from vitoats.common.devices import storage_device
from vitoats.common.errors import InputError
from vitoats.compression.estimates import MemoryEstimate, count_passes, estimate_memory, estimate_work
from vitoats.compression.job import CompressionJob
from vitoats.methods.registry import Method, Recipe, get_method
from vitoats.methods.statistics import StatisticsLevel
from vitoats.models.blocks import Block, ModelAdapter
from vitoats.models.units import layer_roles

log = logging.getLogger("vitoats")

MEMORY_SHARE = 0.5  # of the machine's memory, up to which intermediate results are kept, unless a limit is given


@dataclass(frozen=True)
class CompressionPlan:
    """The plan of a compression.

    Attributes:
        adapter: the model; its blocks have only the layers to compress, and its skipped layers include those left dense.
        method: the method that solves the layers.
        configs: the method's configs, by layer name.
        recipe: the reconstruction target, and whether biases are refitted.
        n_images: maximum number of calibration images.
        batch_size: how many images a block runs on at a time.
        level: which statistics of a layer's input are collected.
        keep: whether intermediate results are kept instead of computed again.
        int8: whether weights are rounded to int8, and layers quantize their inputs.
        spill_to: the folder for a file of hidden states; None keeps them in memory.
        storage: the device whose memory holds hidden states and what is kept of a block.
    """

    adapter: ModelAdapter
    method: Method
    configs: dict[str, Any]
    recipe: Recipe
    n_images: int
    batch_size: int
    level: StatisticsLevel
    keep: bool
    int8: bool
    spill_to: Path | None
    storage: torch.device


def plan_compression(
    adapter: ModelAdapter,
    job: CompressionJob,
    n_images: int,
    budgets: Budgets | None = None,
    scratch: Path | None = None,
) -> CompressionPlan:
    """Makes the plan, and logs the memory and arithmetic it will take.

    Args:
        adapter: the dense model.
        job: its method, config, recipe, weights and resources are used.
        n_images: maximum number of calibration images.
        budgets: settings of single layers by name, which override the config's.
        scratch: a folder with room for the hidden states, used if the estimate is above the memory limit.

    Raises:
        InputError: the method does not fit the model or the other settings, or a budget leaves nothing of a layer.
    """
    method, recipe = get_method(job.method), job.recipe
    blocks, left_dense = chosen_blocks(adapter, method, job.config, job.fused_qkv)
    layers = [layer for block in blocks for layer in block.linears]
    configs = {layer.name: replace(job.config, **(budgets or {}).get(layer.name, {})) for layer in layers}
    two_paths = recipe.target in FROM_DENSE_PATH
    level: StatisticsLevel = "full" if two_paths or recipe.refit_bias else method.needs
    if method.needs == "neurons" and level == "full":
        raise InputError(f"the method {job.method} knows nothing of means: leave `refit_bias` out, and `target` at 'block'")
    factors = 0
    for layer in layers:  # a budget that leaves nothing fails here
        d_in = layer.module.in_features
        factors += sum(configs[layer.name].budget(d_out, d_in).rank * (d_out + d_in) for d_out in layer.heights)
    limit, batch_size = job.resources.memory_limit_bytes, job.resources.batch_size
    memory = estimate_memory(adapter, n_images, batch_size, factors, job.config.total_compression(), level, 1 + two_paths)
    keep = two_paths and memory.total <= (limit or MEMORY_SHARE * _memory())
    memory = memory if keep else replace(memory, kept=0)
    spill_to = plan_memory(memory, limit, scratch)
    storage = storage_device(adapter.device, memory.total) if limit is None else torch.device("cpu")
    passes = count_passes(blocks, recipe.target, keep)
    log.info("arithmetic: %s", estimate_work(adapter, blocks, configs, n_images, level, passes, two_paths))
    chosen = replace(adapter, blocks=blocks, skipped=adapter.skipped + left_dense)
    return CompressionPlan(chosen, method, configs, recipe, n_images, batch_size, level, keep, job.int8, spill_to, storage)


def chosen_blocks(
    adapter: ModelAdapter, method: Method, config: Any, fused_qkv: bool = False
) -> tuple[list[Block], list[tuple[str, str]]]:
    """The blocks with the layers that a method compresses, and (name, reason) of those it leaves dense.

    Args:
        adapter: the model.
        method: decides which layers stay dense.
        config: the method's config.
        fused_qkv: treat a fused qkv as one matrix.

    Raises:
        InputError: the method leaves all layers dense, or does not suit this model.
    """
    roles = layer_roles(adapter.blocks)
    reasons = {x.name: method.left_dense(roles.get(x.name, "other"), config) for x in adapter.linears}
    chosen = [
        replace(block, linears=[x.whole() if fused_qkv else x for x in block.linears if reasons[x.name] is None])
        for block in adapter.blocks
    ]
    if not any(block.linears for block in chosen):
        raise InputError("the method leaves all layers of this model dense: use another `method`")
    return chosen, [(name, reason) for name, reason in reasons.items() if reason is not None]


def plan_memory(estimate: MemoryEstimate, limit: float | None, scratch: Path | None) -> Path | None:
    """Logs the memory estimate; returns the folder for hidden states if the estimate is above the limit, else None.

    Args:
        estimate: the estimate for the whole compression.
        limit: bytes, None for no limit.
        scratch: a folder with room for hidden states.

    Raises:
        InputError: a folder is needed, but ``scratch`` is None.
    """
    log.info("memory: %s", estimate)
    if limit is None or estimate.total <= limit:
        return None
    if estimate.total - estimate.hidden > limit:
        log.warning("the rest alone is above the memory limit of %.2f GB: lower `batch_size`", limit / 1e9)
    if scratch is None:
        raise InputError("a memory limit needs a folder for the hidden states: give scratch")
    log.info("hidden states go to a mapped file in %s, to stay below %.2f GB", scratch, limit / 1e9)
    return scratch


def _memory() -> int:
    """Bytes of the machine's memory, or of the container's share of it."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(physical, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no container, or one without a limit
        return physical
