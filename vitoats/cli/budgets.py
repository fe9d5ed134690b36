"""From --allocation, and a goal where there is one, to the method's config and budgets of single layers."""

import dataclasses
from argparse import Namespace
from typing import TYPE_CHECKING, Any

from vitoats.cli import common
from vitoats.common.errors import InputError

if TYPE_CHECKING:
    from vitoats.allocation.constraint import Budgets, Goal
    from vitoats.allocation.sensitivity import Sensitivity
    from vitoats.data.calibration import CalibrationImages
    from vitoats.methods.registry import Recipe
    from vitoats.models.blocks import ModelAdapter
    from vitoats.models.inputs import ImageInputs

ALLOCATION_IMAGES = 96  # of the calibration images, that budgets are split with
GOAL_FEATURE_IMAGES = 48  # of these, for a goal: which layers stay dense is decided by small errors


def make_budgets(
    args: Namespace,
    recipe: "Recipe",
    config: Any,
    model: Any,
    inputs: "ImageInputs",
    images: "CalibrationImages",
    goal: "Goal | None" = None,
) -> tuple[Any, "Budgets | None"]:
    """The config, its compression being what the goal comes to, and budgets of single layers, None where all have the config's.

    Raises:
        InputError: the pattern leaves no choice, or no split gives what was asked for.
    """
    if recipe.allocation == "uniform":
        return (dataclasses.replace(config, compression=goal.uniform()) if goal else config), None
    pattern = getattr(config, "pattern", "layer")  # of what is measured, for a method without patterns
    if ":" in pattern:
        if "allocation" not in args:
            return config, None
        raise InputError(f"--allocation {recipe.allocation} needs a budget for each layer, which {pattern} fixes: leave it out")
    from vitoats.allocation.lagrange import allocate, check_compression
    from vitoats.allocation.sensitivity import counted_by_depth
    from vitoats.calibration.targets import FROM_DENSE_PATH
    from vitoats.models.adapter import adapt

    adapter = adapt(model, inputs)
    few = dataclasses.replace(images, nsamples=min(images.nsamples, ALLOCATION_IMAGES))
    if recipe.allocation == "owl":
        return config, _owl(args, adapter, few, config.total_compression())
    if goal is None:
        check_compression(config.total_compression())
    free = goal is not None and len(goal.rank_ratios) > 1
    sensitivities = _sensitivities(args, recipe, config, pattern, adapter, few, free, goal is not None)
    if recipe.target in FROM_DENSE_PATH:
        sensitivities = counted_by_depth(sensitivities, [[x.name for x in block.linears] for block in adapter.blocks])
    if goal is None:
        return config, allocate(sensitivities, (1 - config.total_compression()) * sum(s.parameters for s in sensitivities))
    budgets = goal.allocate(sensitivities)
    return dataclasses.replace(config, compression=goal.compression(goal.contents(config, budgets))), budgets


def _owl(args: Namespace, adapter: "ModelAdapter", images: "CalibrationImages", compression: float) -> "Budgets":
    from vitoats.allocation.owl import owl
    from vitoats.calibration.hidden_states import HiddenStates
    from vitoats.compression.outliers import outlier_shares

    hidden = HiddenStates.collect(adapter, images.batches(args.batch_size, args.workers), images.nsamples, args.batch_size)
    with common.Bar("allocation: block", args.quiet) as bar:
        shares = outlier_shares(adapter.blocks, hidden, progress=lambda i: bar.update(i, len(adapter.blocks), "outliers"))
    weights = [{x.name: x.module.weight.numel() for x in block.linears} for block in adapter.blocks if block.linears]
    return owl(shares, weights, compression)


def _sensitivities(
    args: Namespace,
    recipe: "Recipe",
    config: Any,
    pattern: str,
    adapter: "ModelAdapter",
    images: "CalibrationImages",
    without_rank: bool,
    for_goal: bool,
) -> "list[Sensitivity]":
    """From the cache, or measured now."""
    from vitoats.allocation.sensitivity import RATES, Sensitivity
    from vitoats.calibration.hidden_states import HiddenStates
    from vitoats.common.cache import cached
    from vitoats.compression.resume import fingerprint
    from vitoats.compression.sensitivity import FEATURE_IMAGES, measure_sensitivities
    from vitoats.methods.oats_h import OATSHConfig

    feature_images = GOAL_FEATURE_IMAGES if for_goal else FEATURE_IMAGES
    measured_with = OATSHConfig(rank_ratio=getattr(config, "rank_ratio", 0.0), pattern=pattern)
    settings = {
        "data": [args.data_dir, args.general_images, recipe.calibration_mix, images.nsamples, args.seed],
        "config": dataclasses.asdict(measured_with),
        "refit_bias": recipe.refit_bias,
        **adapter.inputs.to_dict(),
        "rates": [RATES, feature_images, without_rank],
    }

    def make() -> list[dict[str, Any]]:
        hidden = HiddenStates.collect(adapter, images.batches(args.batch_size, args.workers), images.nsamples, args.batch_size)
        with common.Bar("allocation: block", args.quiet) as bar:
            n_blocks = len(adapter.blocks)
            found = measure_sensitivities(
                adapter,
                hidden,
                measured_with,
                recipe.refit_bias,
                without_rank,
                feature_images,
                progress=lambda i, what: bar.update(i, n_blocks, what),
            )
        return [dataclasses.asdict(row) for row in found]

    def read(rows: list[dict[str, Any]]) -> "list[Sensitivity]":
        return [Sensitivity.from_json(row) for row in rows]

    return cached(f"sensitivity_{fingerprint(adapter.model, settings)[:32]}", read, make)
