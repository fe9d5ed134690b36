"""From --speedup, --max-ms or --max-mb to a goal that the budgets of layers are to meet, and the table of costs it needs."""

import dataclasses
import hashlib
import json
import os
from argparse import Namespace
from typing import TYPE_CHECKING, Any

from vitoats.cli import common
from vitoats.common.errors import InputError

if TYPE_CHECKING:
    from vitoats.allocation.constraint import Budgets, Goal
    from vitoats.allocation.cost import CostTable
    from vitoats.loading.load import LoadedModel
    from vitoats.methods.registry import Method, Recipe
    from vitoats.models.shapes import LayerShape

GOAL_FLAGS = ("speedup", "max_ms", "max_mb")
GRAPH_BYTES, NODE_BYTES = 10_000, 1_500  # of an exported file, all but weights: in all, and for each linear layer in a block


def refuse_goal(args: Namespace, reason: str, flags: tuple[str, ...] = (*GOAL_FLAGS, "cost_table")) -> None:
    """Refuses goals, where there can be none.

    Raises:
        InputError: one of the flags is given.
    """
    for name in flags:
        if getattr(args, name, None) is not None:
            raise InputError(f"--{name.replace('_', '-')} is out of place, {reason}")


def make_goal(args: Namespace, method: "Method", recipe: "Recipe", config: Any, loaded: "LoadedModel") -> "Goal | None":
    """The goal that the flags ask for, None if they ask for a compression. A table of costs is measured if none is given.

    Raises:
        InputError: the flags contradict each other, or the goal cannot be reached.
    """
    asked = {name: getattr(args, name) for name in GOAL_FLAGS if name in args}
    if not asked:
        refuse_goal(args, "a compression needs no table: leave it out", ("cost_table",))
        return None
    if ":" in getattr(config, "pattern", ""):
        refuse_goal(args, f"{config.pattern} fixes what is removed: leave it out, or give --pattern row")
    if args.format == "dense":
        refuse_goal(args, "--format dense writes weights as large and as slow as before: leave one of them out")
    if recipe.allocation == "owl":
        refuse_goal(args, "owl splits a compression: give --allocation sensitivity, or uniform")
    from vitoats.allocation.constraint import Goal
    from vitoats.allocation.cost import exported_bytes
    from vitoats.compression.plan import chosen_blocks
    from vitoats.models.adapter import adapt
    from vitoats.models.shapes import layer_shapes

    adapter = adapt(loaded.timm_model, loaded.inputs)
    shapes = layer_shapes(adapter)
    chosen = {x.name for block in chosen_blocks(adapter, method, config)[0] for x in block.linears}
    left_dense = [shape for name, shape in shapes.items() if name not in chosen]
    own = {n: s for n, s in layer_shapes(adapter, args.fused_qkv).items() if n in chosen}
    flag, value = next(iter(asked.items()))
    common_parts: dict[str, Any] = {
        "asked": asked,
        "layers": own,
        "config": config,
        "free_rank_ratio": "rank_ratio" not in args,
    }
    if flag == "max_mb":
        refuse_goal(args, "megabytes need no table: leave it out", ("cost_table",))
        others = sum(p.numel() for p in loaded.model.parameters()) - sum(shapes[name].size for name in chosen)
        rest = (4 * others + GRAPH_BYTES + NODE_BYTES * len(shapes)) / 1e6
        goal = Goal(
            unit="MB",
            limit=value,
            dense=rest + sum(4 * shape.size for shape in own.values()) / 1e6,
            rest=rest,
            cost=lambda shape, kept: exported_bytes(shape, kept) / 1e6,
            **common_parts,
        )
    else:
        table = cost_table(args, loaded, list(shapes.values()))
        goal = Goal(
            unit="ms",
            limit=table.dense_ms / value if flag == "speedup" else value,
            dense=table.dense_ms,
            rest=table.rest_ms + sum(table.times[shape].dense_ms for shape in left_dense),
            cost=table.ms,
            **common_parts,
        )
        common.log.info("costs: %d threads, batch %d, on %s", table.threads, table.batch, table.processor)
    goal.check(recipe.allocation)
    return goal


def cost_table(args: Namespace, loaded: "LoadedModel", shapes: list["LayerShape"]) -> "CostTable":
    """The table of --cost-table, or of this machine: from the cache, or measured now.

    Raises:
        InputError: the file holds no table of this model.
    """
    from vitoats.allocation.cost import CostTable
    from vitoats.common.cache import cached
    from vitoats.runtime.library import isa

    if args.cost_table is not None:
        table = CostTable.read(args.cost_table)
        table.check(shapes, args.cost_table)
        return table
    threads = args.threads or common.cores()
    machine = [common.processor(), os.cpu_count(), isa(), threads, type(loaded.timm_model).__name__]
    key = json.dumps([machine, sorted(map(dataclasses.astuple, shapes))])

    def measure() -> dict[str, Any]:
        from vitoats.cli.benchmark_costs import measure_costs

        common.log.info("measuring what layers cost on %d threads; it is kept for the next time", threads)
        with common.Bar("costs: shape", args.quiet) as bar:
            return measure_costs(loaded, 1, threads, 0, bar.update)

    return cached(f"costs_{hashlib.sha256(key.encode()).hexdigest()[:32]}", CostTable.from_json, measure)


def say_prediction(goal: "Goal", config: Any, budgets: "Budgets | None") -> dict[str, float]:
    """Says what the budgets are predicted to cost; returns it for the JSON line."""
    contents = goal.contents(config, budgets)
    predicted = goal.predicted(contents)
    common.log.info(
        "predicted: %.4g %s (dense %.4g), %.1f %% of the block weights removed",
        predicted,
        goal.unit,
        goal.dense,
        100 * goal.compression(contents),
    )
    if goal.unit == "MB":
        return {"predicted_mb": round(predicted, 3)}
    return {"predicted_ms": round(predicted, 3), "predicted_speedup": round(goal.dense / predicted, 3)}
