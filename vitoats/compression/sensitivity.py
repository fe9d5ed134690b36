"""Finds what compressing each layer alone does to a model (``evaluation.effect``), for ``allocation.sensitivity``."""

import math
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch

from vitoats.allocation.sensitivity import RATE_WITHOUT_RANK, RATES, Sensitivity
from vitoats.calibration.hidden_states import HiddenStates
from vitoats.calibration.moments import input_statistics
from vitoats.calibration.walk import walk
from vitoats.common import ranks
from vitoats.common.errors import InputError
from vitoats.common.unfinished import Unfinished
from vitoats.compression.layer import LayerProblem
from vitoats.evaluation.effect import Effects, FeatureEffects, LayerEffects
from vitoats.evaluation.second_order import PredictionEffects
from vitoats.methods.oats_h import OATSHConfig, oats_h
from vitoats.methods.statistics import InputStatistics
from vitoats.models.blocks import LinearLayer, ModelAdapter
from vitoats.models.flops import count_flops
from vitoats.models.inputs import TextInputs

FEATURE_IMAGES = 8  # images to measure features on (docs/oats-h.md, Allocation)
GRADIENT_PASSES = 5  # one forward; forward and backward for the gradients of blocks' outputs, and again for their layers'


@torch.inference_mode(mode=False)  # gradients are needed
@torch.no_grad()
def measure_sensitivities(
    adapter: ModelAdapter,
    hidden: HiddenStates,
    config: OATSHConfig,
    refit_bias: bool = False,
    without_rank: bool = False,
    feature_images: int = FEATURE_IMAGES,
    progress: Callable[[int, str], None] = lambda *_: None,
    unfinished: Unfinished | None = None,
) -> list[Sensitivity]:
    """Measures every layer, compressed by the cheap solver of OATS-H.

    Args:
        adapter: the dense model; unchanged afterwards.
        hidden: the hidden states that give the layers' moments; advanced in place.
        config: its pattern and rank ratio are used to compress the layers.
        refit_bias: let biases absorb the mean of a layer's lost output, as the compression will.
        without_rank: also measure each layer without a low-rank term.
        feature_images: the features are measured on at least this many of the images.
        progress: called with the block's index and what is being done.
        unfinished: the layers that an interrupted measurement has finished; further ones are added.

    Raises:
        InputError: no two images have different features.
    """
    every = _stride(hidden.n_images, feature_images)
    if hidden.n_images < 2:
        raise InputError("budgets cannot be measured on one image: give `nsamples` 2 or more, or `allocation='uniform'`")
    cheap = _cheap_configs(config, without_rank)
    of_adapter = PredictionEffects if isinstance(adapter.inputs, TextInputs) else FeatureEffects
    effects: Effects = of_adapter(adapter, hidden.of_images(every).clone())
    known = {row["name"]: Sensitivity.from_json(row) for row in unfinished.parts} if unfinished else {}
    found = []
    for index, block in enumerate(walk(adapter.blocks, hidden)):
        if not block.linears:
            continue
        if all(layer.name in known for layer in block.linears):
            progress(index, "resuming")
            found += [known[layer.name] for layer in block.linears]
            continue
        progress(index, "calibrating")
        statistics = input_statistics(hidden, block, "full")
        of_layers = effects.before(index, hidden.of_images(every))

        def error_of(
            task: tuple[LinearLayer, OATSHConfig],
            index: int = index,
            moments: Any = statistics,
            of_layers: LayerEffects = of_layers,
        ) -> float:
            layer, config = task
            progress(index, layer.name)
            return _layer_error(layer, moments[layer.name].to(hidden.device), config, refit_bias, of_layers)

        tasks = [(layer, config) for layer in block.linears for config in cheap]
        costs = [
            of_layers.multiply_adds(layer)
            + sum(config.multiply_adds(height, layer.module.in_features) for height in layer.heights)
            for layer, config in tasks
        ]
        errors = list(ranks.shared_out(tasks, costs, error_of, lambda error: ({}, error), lambda _, error: error))
        for i, layer in enumerate(block.linears):
            of_layer = errors[i * len(cheap) : (i + 1) * len(cheap)]
            measured, rest = tuple(of_layer[: len(RATES)]), of_layer[len(RATES) :]
            found.append(Sensitivity(layer.name, layer.module.weight.numel(), measured, *rest))
        if unfinished:
            unfinished.add(asdict(row) for row in found[len(found) - len(block.linears) :])
    return found


def sensitivity_work(
    adapter: ModelAdapter, config: OATSHConfig, without_rank: bool, n_images: int, feature_images: int = FEATURE_IMAGES
) -> float:
    """Multiply-adds that ``measure_sensitivities`` takes with ``n_images`` images, about."""
    cheap = _cheap_configs(config, without_rank)
    n_blocks, few = len(adapter.blocks), -(-n_images // _stride(n_images, feature_images))
    text = isinstance(adapter.inputs, TextInputs)
    model_passes, rest = 2.0 * n_images, 0
    if text:
        model_passes += few * (GRADIENT_PASSES + len(cheap))
    for index, block in enumerate(adapter.blocks):
        for layer in block.linears:
            model_passes += 0 if text else len(cheap) * few * (1 - index / n_blocks)
            d_in = layer.module.in_features
            tokens = n_images * math.prod(block.shape_before) // block.linears[0].module.in_features
            rest += tokens * d_in**2 + sum(c.multiply_adds(height, d_in) for c in cheap for height in layer.heights)
    return model_passes * count_flops(adapter.model, adapter.inputs) + rest


def _stride(n_images: int, feature_images: int) -> int:
    """The n for which features are measured on every n-th image."""
    return max(1, n_images // feature_images)


def _cheap_configs(config: OATSHConfig, without_rank: bool) -> list[OATSHConfig]:
    """The configs that each layer is compressed with."""
    quick = replace(config, solver="support", iterations=8, refit_rounds=2, refit_iterations=4)
    cheap = [replace(quick, compression=rate) for rate in RATES]
    return [*cheap, replace(quick, compression=RATE_WITHOUT_RANK, rank_ratio=0.0)] if without_rank else cheap


def _layer_error(
    layer: LinearLayer,
    statistics: InputStatistics,
    config: OATSHConfig,
    refit_bias: bool,
    effects: LayerEffects,
) -> float:
    """The error with one layer compressed."""
    module = layer.module
    refit_bias = refit_bias and module.bias is not None
    problem = LayerProblem(
        module.weight.float(), module.bias.data if refit_bias else None, layer.heights, statistics, refit_bias
    )
    parts = problem.solve(partial(oats_h, config=config))
    weight = torch.cat([p.S + p.U @ p.V for p in parts]).to(module.weight)
    return effects.error(layer, weight, problem.refitted_bias(module.weight - weight) if refit_bias else None)
