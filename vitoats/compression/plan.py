"""The plan of a compression, made before it starts: which layers, with which settings, and in how much memory."""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from vitoats.allocation.constraint import Budgets
from vitoats.allocation.cost import footprint
from vitoats.calibration.targets import FROM_DENSE_PATH
from vitoats.common import ranks
from vitoats.common.devices import storage_device
from vitoats.common.errors import InputError
from vitoats.compression.budgets import budgets_memory
from vitoats.compression.estimates import MemoryEstimate, WorkEstimate, count_passes, estimate_memory, estimate_work
from vitoats.compression.job import CompressionJob
from vitoats.loading.language_on_disk import ModelOnDisk
from vitoats.methods.registry import Method, Recipe, get_method
from vitoats.methods.statistics import StatisticsLevel
from vitoats.models.blocks import Block, ModelAdapter
from vitoats.models.shapes import LayerShape
from vitoats.models.units import layer_roles

log = logging.getLogger("vitoats")

ROUNDING = 0.05  # relative difference of what is kept from what was asked for that goes without saying
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
        memory: the memory that it takes.
        spill_to: the folder for a file of hidden states; None keeps them in memory.
        storage: the device whose memory holds hidden states and what is kept of a block.
        types: the types in which the model's tensors are stored, by name; others are stored in float32.
        disk: what reads the blocks while they run; None if they are in memory.
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
    memory: MemoryEstimate
    spill_to: Path | None
    storage: torch.device
    types: Mapping[str, torch.dtype] = field(default_factory=dict)
    disk: ModelOnDisk | None = None

    def with_budgets(self, config: Any, budgets: Budgets | None) -> "CompressionPlan":
        """The plan with the config of the whole model, and budgets of single layers, which override it.

        Raises:
            InputError: a budget leaves nothing of a layer.
        """
        configs = {name: replace(config, **(budgets or {}).get(name, {})) for name in self.configs}
        kept, total = 0, 0
        for layer in self.adapter.linears:
            for height in layer.heights:
                shape = LayerShape(height, layer.module.in_features, 1, tokens=1)
                kept += footprint(shape, configs[layer.name]).parameters
                total += shape.size
        asked = 1 - config.total_compression()
        if abs(kept / total - asked) > ROUNDING * asked:
            log.warning(
                "%.4g of the weights will be removed, not %.4g: layers keep a whole number of entries in each row or group",
                1 - kept / total,
                1 - asked,
            )
        return replace(self, configs=configs)

    @property
    def work(self) -> WorkEstimate:
        """The arithmetic that it takes at most."""
        two_paths = self.recipe.target in FROM_DENSE_PATH
        passes = count_passes(self.adapter.blocks, self.recipe.target, self.keep)
        return estimate_work(self.adapter, self.configs, self.n_images, self.level, passes, two_paths)


def plan_compression(
    adapter: ModelAdapter,
    job: CompressionJob,
    n_images: int,
    scratch: Path | None = None,
    types: Mapping[str, torch.dtype] | None = None,
    disk: ModelOnDisk | None = None,
) -> CompressionPlan:
    """Makes the plan, in which every layer has the job's own config.

    Args:
        adapter: the dense model.
        job: its method, config, recipe, weights and resources are used.
        n_images: maximum number of calibration images.
        scratch: a folder with room for the hidden states, used if the estimate is above the memory limit.
        types, disk: see ``CompressionPlan``.

    Raises:
        InputError: the method does not fit the model or the other settings.
    """
    method, recipe = get_method(job.method), job.recipe
    blocks, left_dense = chosen_blocks(adapter, method, job.config, job.fused_qkv)
    two_paths = recipe.target in FROM_DENSE_PATH
    level: StatisticsLevel = "full" if two_paths or recipe.refit_bias else method.needs
    if method.needs == "neurons" and level == "full":
        raise InputError(f"the method {job.method} knows nothing of means: leave `refit_bias` out, and `target` at 'block'")
    weights = sum(layer.module.weight.numel() for block in blocks for layer in block.linears)
    compression = job.config.total_compression()
    factors = round(getattr(job.config, "rank_ratio", 0.0) * (1 - compression) * weights)
    limit, batch_size = job.resources.memory_limit_bytes, job.resources.batch_size
    weight_bytes = max((dtype.itemsize for dtype in (types or {}).values()), default=4)
    memory = estimate_memory(
        adapter, ranks.share(n_images), batch_size, factors, compression, level, 1 + two_paths, weight_bytes
    )
    budgets, predictions = budgets_memory(job, adapter, n_images)
    memory = replace(memory, budgets=budgets, predictions=predictions)
    keep = two_paths and memory.total <= (limit or MEMORY_SHARE * _memory() / ranks.on_this_machine())
    memory = memory if keep else replace(memory, kept=0)
    return CompressionPlan(
        adapter=replace(adapter, blocks=blocks, skipped=adapter.skipped + left_dense),
        method=method,
        configs={layer.name: job.config for block in blocks for layer in block.linears},
        recipe=recipe,
        n_images=n_images,
        batch_size=batch_size,
        level=level,
        keep=keep,
        int8=job.int8,
        memory=memory,
        spill_to=plan_memory(memory, limit, scratch),
        storage=storage_device(adapter.device, memory.total) if limit is None else torch.device("cpu"),
        types=types or {},
        disk=disk,
    )


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
    """The folder for hidden states, if the estimate is above the limit; above it without them, too, nothing helps.

    Args:
        estimate: the estimate for the whole compression.
        limit: bytes, None for no limit.
        scratch: a folder with room for hidden states.

    Raises:
        InputError: the limit is too low even so, or a folder is needed, but ``scratch`` is None.
    """
    if limit is None or estimate.total <= limit:
        return None
    if (rest := replace(estimate, hidden=0)).total > limit:
        raise InputError(
            f"with hidden states on disk it takes {rest.total / 1e9:.2f} GB, above the memory limit of {limit / 1e9:.3g} GB: "
            f"lower `batch_size`, or raise `memory_limit`"
        )
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
