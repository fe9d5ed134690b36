"""Turns a cost limit for the exported model into a constraint on budgets, and provides the cost table it needs."""

import dataclasses
import logging
import os
from functools import partial
from typing import Any

from vitoats.allocation.constraint import Budgets, Constraint
from vitoats.allocation.cost import CostTable, dense, exported_bytes, exported_int8_bytes
from vitoats.benchmark.costs import measure_costs
from vitoats.common import ranks
from vitoats.common.cache import cached
from vitoats.common.fingerprint import json_sha256
from vitoats.common.machine import cores, processor
from vitoats.common.progress import Progress
from vitoats.compression.job import CompressionJob, CostLimit
from vitoats.compression.plan import chosen_blocks
from vitoats.loading.loaded import LoadedModel
from vitoats.methods.registry import Method
from vitoats.models.blocks import ModelAdapter
from vitoats.models.shapes import LayerShape, layer_shapes
from vitoats.runtime.library import isa

log = logging.getLogger("vitoats")

GRAPH_BYTES, NODE_BYTES = 10_000, 1_500  # of an exported file without its weights: in total, and per linear layer in a block


def make_constraint(
    job: CompressionJob,
    limit: CostLimit,
    method: Method,
    loaded: LoadedModel,
    adapter: ModelAdapter,
    progress: Progress,
) -> Constraint:
    """Makes the constraint that a limit means for this model.

    Args:
        job: the compression job.
        limit: its cost limit.
        method: its method.
        loaded: the dense model.
        adapter: the same model as a chain of blocks.
        progress: called with what is being measured, if there is no cost table yet.

    Raises:
        InputError: the limit is out of reach, or the cost table is for another model.
    """
    shapes = layer_shapes(adapter)
    chosen = {x.name for block in chosen_blocks(adapter, method, job.config)[0] for x in block.linears}
    own = {name: shape for name, shape in layer_shapes(adapter, job.fused_qkv).items() if name in chosen}
    shared: dict[str, Any] = {
        "asked": {limit.kind: limit.value},
        "layers": own,
        "config": job.config,
        "free_rank_ratio": limit.free_rank_ratio,
        "int8": job.int8,
    }
    if limit.kind == "max_mb":
        others = sum(p.numel() for p in loaded.model.parameters()) - sum(shapes[name].size for name in chosen)
        rest = (4 * others + GRAPH_BYTES + NODE_BYTES * len(shapes)) / 1e6
        layer_bytes = exported_int8_bytes if job.int8 else exported_bytes
        constraint = Constraint(
            unit="MB",
            limit=limit.value,
            dense=rest + sum(layer_bytes(shape, dense(shape)) for shape in own.values()) / 1e6,
            rest=rest,
            cost=lambda shape, kept: layer_bytes(shape, kept) / 1e6,
            dense_name="the dense int8 model" if job.int8 else "the dense model",
            **shared,
        )
    else:
        table = cost_table(limit, loaded, list(shapes.values()), job.int8, job.resources.threads or cores(), progress)
        left_dense = [shape for name, shape in shapes.items() if name not in chosen]
        constraint = Constraint(
            unit="ms",
            limit=table.dense_ms / limit.value if limit.kind == "speedup" else limit.value,
            dense=table.dense_ms,
            rest=table.rest_ms + sum(table.times[shape].dense_ms for shape in left_dense),
            cost=table.ms,
            **shared,
        )
        log.info("costs: %d threads, batch %d, on %s", table.threads, table.batch, table.processor)
    constraint.check(job.recipe.allocation)
    return constraint


def cost_table(
    limit: CostLimit, loaded: LoadedModel, shapes: list[LayerShape], int8: bool, threads: int, progress: Progress
) -> CostTable:
    """The limit's own table, or one of this machine, cached or measured now, for float32 or int8 weights.

    Raises:
        InputError: the file holds no cost table for this model.
    """
    if limit.cost_table is not None:
        table = CostTable.read(limit.cost_table, int8)
        table.check(shapes, limit.cost_table)
        return table
    machine = [processor(), os.cpu_count(), isa(), threads, type(loaded.timm_model).__name__]
    key = json_sha256([machine, sorted(map(dataclasses.astuple, shapes))])

    def measure() -> dict[str, Any]:
        log.info("measuring what layers cost on %d threads; it is kept for the next time", threads)
        return ranks.from_first(lambda: measure_costs(loaded, 1, threads, 0, partial(progress, "costs: shape")))

    return cached(f"costs_{key[:32]}", lambda values: CostTable.of_model(values, shapes, int8), measure)


def predict(constraint: Constraint, config: Any, budgets: Budgets | None) -> dict[str, float]:
    """Logs the predicted cost of the budgets, and returns it as it appears in the JSON line."""
    footprints = constraint.footprints(config, budgets)
    predicted = constraint.predicted(footprints)
    log.info(
        "predicted: %.4g %s (dense %.4g), %.1f %% of the block weights removed",
        predicted,
        constraint.unit,
        constraint.dense,
        100 * constraint.compression(footprints),
    )
    if constraint.unit == "MB":
        return {"predicted_mb": round(predicted, 3)}
    return {"predicted_ms": round(predicted, 3), "predicted_speedup": round(constraint.dense / predicted, 3)}
