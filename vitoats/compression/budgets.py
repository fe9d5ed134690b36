"""Splits a job's budget over the layers: equally, by outliers, or by measured sensitivities, optionally within a cost limit."""

import dataclasses
import math
from typing import Any

from vitoats.allocation.constraint import Budgets, Constraint
from vitoats.allocation.lagrange import allocate, check_compression
from vitoats.allocation.owl import owl
from vitoats.allocation.sensitivity import RATES, Sensitivity, counted_by_depth, read_sensitivities
from vitoats.calibration.hidden_states import HiddenStates
from vitoats.calibration.targets import FROM_DENSE_PATH
from vitoats.common import ranks
from vitoats.common.cache import cache_file, cached
from vitoats.common.fingerprint import fingerprint
from vitoats.common.progress import Progress
from vitoats.common.unfinished import Unfinished, remove_unfinished
from vitoats.compression.job import CompressionJob
from vitoats.compression.outliers import outlier_shares
from vitoats.compression.sensitivity import FEATURE_IMAGES, measure_sensitivities, sensitivity_work
from vitoats.data.calibration import CalibrationImages
from vitoats.loading.loaded import LoadedModel
from vitoats.loading.loaded_text import LoadedLanguageModel
from vitoats.methods.oats_h import OATSHConfig
from vitoats.models.blocks import ModelAdapter
from vitoats.models.flops import count_flops
from vitoats.models.inputs import TextInputs
from vitoats.models.text_inputs import LOGITS_AT_A_TIME

ALLOCATION_IMAGES = 96  # calibration images used to split the budget
ALLOCATION_WINDOWS = 32  # the same, of text
FEATURE_TOKENS = 4096  # of these, on which a language model's predictions are compared
LOGITS = 4  # tensors of this size at a time: logits, their log probabilities, probabilities and gradients
CONSTRAINT_FEATURE_IMAGES = 48  # of these, under a cost limit: small errors decide which layers stay dense


def make_budgets(
    job: CompressionJob,
    adapter: ModelAdapter,
    images: CalibrationImages,
    constraint: Constraint | None,
    loaded: LoadedModel | LoadedLanguageModel,
    progress: Progress,
) -> tuple[Any, Budgets | None]:
    """The method's config, with the compression that a constraint implies, and the budgets of single layers.

    Args:
        job: the compression job.
        adapter: the dense model, on the device.
        images: the calibration images.
        constraint: on the cost of the exported model; None uses the config's compression.
        loaded: the same model, by whose weights and preprocessing measurements are kept.
        progress: called with what is being measured.

    Returns:
        the config, and budgets by layer name; None if every layer has the config's.

    Raises:
        InputError: no split meets the compression or the constraint.
    """
    config, allocation = job.config, job.recipe.allocation
    if allocation == "uniform":
        return (dataclasses.replace(config, compression=constraint.uniform()) if constraint else config), None
    if ":" in getattr(config, "pattern", ""):
        return config, None  # N:M fixes what each layer keeps
    some = images.at_most(_allocation_images(adapter))
    if allocation == "owl":
        hidden = _hidden_states(job, adapter, some)
        n_blocks = len(adapter.blocks)
        shares = outlier_shares(
            adapter.blocks, hidden, progress=lambda i: progress("allocation: block", i, n_blocks, "outliers")
        )
        weights = [{x.name: x.module.weight.numel() for x in block.linears} for block in adapter.blocks if block.linears]
        return config, owl(shares, weights, config.total_compression())
    if constraint is None:
        check_compression(config.total_compression())
    sensitivities = _sensitivities(job, adapter, some, constraint, loaded, progress)
    if job.recipe.target in FROM_DENSE_PATH:
        sensitivities = counted_by_depth(sensitivities, [[x.name for x in block.linears] for block in adapter.blocks])
    if constraint is None:
        kept = (1 - config.total_compression()) * sum(s.parameters for s in sensitivities)
        return config, allocate(sensitivities, kept)
    budgets = constraint.allocate(sensitivities)
    reached = constraint.compression(constraint.footprints(config, budgets))
    return dataclasses.replace(config, compression=reached), budgets


def _sensitivities(
    job: CompressionJob,
    adapter: ModelAdapter,
    images: CalibrationImages,
    constraint: Constraint | None,
    loaded: LoadedModel | LoadedLanguageModel,
    progress: Progress,
) -> list[Sensitivity]:
    """Reads the sensitivities from the cache, or measures them."""
    data = job.data
    measured_with, without_rank, feature_images = _measurement(job, adapter)
    settings = {
        "data": [images.digests(), job.recipe.calibration_mix, images.nsamples, data.seed],
        "config": dataclasses.asdict(measured_with),
        "refit_bias": job.recipe.refit_bias,
        "preprocessing": loaded.preprocessing.to_dict(),
        "rates": [RATES, feature_images, without_rank],
    }
    if isinstance(adapter.inputs, TextInputs):
        settings["effects"] = "second order"
    name = f"sensitivity_{fingerprint(loaded.dense_tensors(), settings)[:32]}"

    def make() -> list[dict[str, Any]]:
        found = measure_sensitivities(
            adapter,
            _hidden_states(job, adapter, images),
            measured_with,
            job.recipe.refit_bias,
            without_rank,
            feature_images,
            lambda i, what: progress("allocation: block", i, len(adapter.blocks), what),
            Unfinished(name),
        )
        return [dataclasses.asdict(row) for row in found]

    def read(values: Any) -> list[Sensitivity]:
        layers = [(x.name, x.module.weight.numel()) for block in adapter.blocks for x in block.linears]
        return read_sensitivities(values, layers, without_rank)

    found = cached(name, read, make)
    if cache_file(name).is_file():  # else the next run goes on from the parts
        remove_unfinished(name)
    return found


def _allocation_images(adapter: ModelAdapter) -> int:
    return ALLOCATION_WINDOWS if isinstance(adapter.inputs, TextInputs) else ALLOCATION_IMAGES


def _measurement(job: CompressionJob, adapter: ModelAdapter) -> tuple[OATSHConfig, bool, int]:
    """How sensitivities are measured: with which config, whether also without a low-rank term, and on how many images."""
    measured_with = OATSHConfig(
        rank_ratio=getattr(job.config, "rank_ratio", 0.0),
        pattern=getattr(job.config, "pattern", "layer"),  # for a method without patterns
    )
    if isinstance(adapter.inputs, TextInputs):
        return measured_with, False, max(2, FEATURE_TOKENS // adapter.inputs.seq_len)
    without_rank = job.limit is not None and job.limit.free_rank_ratio and measured_with.rank_ratio > 0
    return measured_with, without_rank, CONSTRAINT_FEATURE_IMAGES if job.limit else FEATURE_IMAGES


def budgets_work(job: CompressionJob, adapter: ModelAdapter, n_images: int) -> float:
    """Multiply-adds that ``make_budgets`` takes with ``n_images`` calibration images, about; benchmarks are not counted."""
    some = min(n_images, _allocation_images(adapter))
    if job.recipe.allocation == "uniform" or ":" in getattr(job.config, "pattern", ""):
        return 0.0
    if job.recipe.allocation == "owl":
        return 2.0 * some * count_flops(adapter.model, adapter.inputs)
    measured_with, without_rank, feature_images = _measurement(job, adapter)
    return sensitivity_work(adapter, measured_with, without_rank, some, feature_images)


def budgets_memory(job: CompressionJob, adapter: ModelAdapter, n_images: int) -> tuple[int, int]:
    """Bytes of what ``make_budgets`` holds between blocks, and of a language model's logits before."""
    if job.recipe.allocation == "uniform" or ":" in getattr(job.config, "pattern", ""):
        return 0, 0
    some = min(n_images, _allocation_images(adapter))
    largest = max(math.prod(block.shape_before) for block in adapter.blocks)
    if not isinstance(adapter.inputs, TextInputs) or job.recipe.allocation == "owl":
        return 4 * ranks.share(some) * largest, 0
    few = min(some, _measurement(job, adapter)[2])
    logits = min(LOGITS_AT_A_TIME, few * adapter.inputs.seq_len * adapter.inputs.vocab_size)
    return 4 * (ranks.share(some) + few * (len(adapter.blocks) + 1)) * largest, 4 * LOGITS * logits


def _hidden_states(job: CompressionJob, adapter: ModelAdapter, images: CalibrationImages) -> HiddenStates:
    stream = images.batches(job.resources.batch_size, job.resources.workers)
    return HiddenStates.collect(adapter, stream, images.nsamples, job.resources.batch_size)
