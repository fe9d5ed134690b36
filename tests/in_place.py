"""Compresses models of tests in place, without a folder or a command."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vitoats.compression.job import CalibrationData, CompressionJob, Resources
from vitoats.compression.pipeline import CompressionReport, compress
from vitoats.compression.plan import plan_compression
from vitoats.loading.source import ModelSource
from vitoats.methods.registry import Recipe
from vitoats.models.adapter import adapt
from vitoats.models.inputs import ImageInputs


def job_of(
    method: str, config: Any, *, fused_qkv=False, int8=False, batch_size=4, memory_limit=None, **recipe: Any
) -> CompressionJob:
    """A job for a model and images in memory."""
    return CompressionJob(
        model=ModelSource(name="in memory"),
        data=CalibrationData(images="in memory"),
        method=method,
        method_digest="",
        config=config,
        recipe=Recipe(**recipe),
        fused_qkv=fused_qkv,
        weights="int8" if int8 else "float32",
        resources=Resources(batch_size=batch_size, memory_limit=memory_limit),
    )


def compress_in_place(
    model: torch.nn.Module, images: Tensor, job: CompressionJob, budgets=None, spill_to=None, **work: Any
) -> CompressionReport:
    """Compresses a model with images [n, 3, size, size], hidden states in a file in ``spill_to``."""
    plan = replace(plan_compression(adapt(model, ImageInputs(images.shape[-1])), job, len(images)), spill_to=spill_to)
    return compress(plan.with_budgets(job.config, budgets), iter(images.split(3)), **work)
