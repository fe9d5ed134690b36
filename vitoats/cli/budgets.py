"""From --allocation to budgets of single layers."""

import dataclasses
from argparse import Namespace
from typing import TYPE_CHECKING, Any

from vitoats.cli import common
from vitoats.errors import InputError

if TYPE_CHECKING:
    from vitoats.data.calibration import CalibrationImages
    from vitoats.methods.registry import Recipe

ALLOCATION_IMAGES = 96  # of the calibration images, that budgets are split with


def make_budgets(
    args: Namespace, recipe: "Recipe", config: Any, model: Any, img_size: int, images: "CalibrationImages"
) -> dict[str, dict[str, float]] | None:
    """Budgets of single layers, None where all have the config's.

    Raises:
        InputError: the pattern leaves no choice, or no split gives what was asked for.
    """
    if recipe.allocation == "uniform":
        return None
    pattern = getattr(config, "pattern", "layer")  # of what is measured, for a method without patterns
    if ":" in pattern:
        if "allocation" not in args:
            return None
        raise InputError(f"--allocation {recipe.allocation} needs a budget for each layer, which {pattern} fixes: leave it out")
    from vitoats.allocation.owl import outlier_shares, owl
    from vitoats.allocation.sensitivity import allocate, cached, check_compression, measure
    from vitoats.calibration import HiddenStates
    from vitoats.methods.oats_h import OATSHConfig
    from vitoats.models.adapter import adapt
    from vitoats.resume import fingerprint

    adapter = adapt(model, img_size)
    few = dataclasses.replace(images, nsamples=min(images.nsamples, ALLOCATION_IMAGES))

    def hidden() -> HiddenStates:
        return HiddenStates.collect(adapter, few.batches(args.batch_size, args.workers), few.nsamples, args.batch_size)

    compression = config.total_compression()
    with common.Bar("allocation: block", args.quiet) as bar:
        n_blocks = len(adapter.linears)
        if recipe.allocation == "owl":
            shares = outlier_shares(adapter, hidden(), progress=lambda i: bar.update(i, n_blocks, "outliers"))
            return owl(adapter, shares, compression)
        check_compression(compression)
        measured_with = OATSHConfig(rank_ratio=getattr(config, "rank_ratio", 0.0), pattern=pattern)
        settings = {
            "data": [args.data_dir, args.general_images, recipe.calibration_mix, few.nsamples, args.seed],
            "config": dataclasses.asdict(measured_with),
            "img_size": img_size,
        }
        sensitivities = cached(
            fingerprint(model, settings),
            lambda: measure(adapter, hidden(), measured_with, lambda i, what: bar.update(i, n_blocks, what)),
        )
    return allocate(sensitivities, (1 - compression) * sum(s.parameters for s in sensitivities))
