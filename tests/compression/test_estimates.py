"""What is said before a compression starts, against hand counts and against what is then really multiplied."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.in_place import compress_in_place, job_of
from vitoats.common.memory import resident_memory
from vitoats.compression.estimates import CODE_BYTES, count_passes, estimate_memory
from vitoats.compression.plan import plan_compression
from vitoats.methods.hessian import REFIT_BYTES
from vitoats.methods.oats import OATSConfig
from vitoats.methods.oats_h import OATSHConfig
from vitoats.models.adapter import adapt
from vitoats.models.inputs import ImageInputs

import timm  # isort: skip

SWIN = {"embed_dim": 24, "depths": (1, 1), "num_heads": (2, 4), "window_size": 4, "img_size": 32, "num_classes": 4}


def test_memory_where_shapes_change():
    model = timm.create_model("swin_tiny_patch4_window7_224", **SWIN).eval()
    estimate = estimate_memory(adapt(model, ImageInputs(32)), nsamples=100, batch_size=8, factors=0, compression=0.5)
    assert estimate.hidden == 100 * (8 * 8 * 24 + 4 * 4 * 48) * 4
    assert estimate.block == 8 * (8 * 8 * 24) * 16 * 4 + 12 * (4 * 48) ** 2


def test_memory_by_hand(tiny):
    estimate = estimate_memory(adapt(tiny, ImageInputs(32)), nsamples=100, batch_size=8, factors=1000, compression=0.5)
    tokens = 16 + 1
    assert estimate.hidden == 100 * tokens * 48 * 4
    assert estimate.block == 8 * tokens * 48 * 16 * 4 + 12 * 192**2
    assert estimate.saving == round(3 * (4 + 8) * 48 * 48 * (2 + 1 / 8))
    fixed = estimate.process + estimate.model
    at_work = estimate.hidden + estimate.statistics + max(estimate.block, estimate.solver)
    assert estimate.total == fixed + max(at_work, estimate.saving)
    assert estimate.solver == 9 * (192 * 48) * 4
    assert estimate.statistics == 8 * (3 * 48**2 + 192**2)  # qkv, proj and fc1; fc2
    full = estimate_memory(
        adapt(tiny, ImageInputs(32)), nsamples=100, batch_size=8, factors=1000, compression=0.5, level="full"
    )
    assert full.statistics == estimate.statistics
    assert full.solver == 13 * 8 * (192 * 48) + 4 * 8 * 192**2 + REFIT_BYTES
    assert full.total == full.process + full.model + full.hidden + full.statistics + max(full.block, full.solver)
    assert estimate.model == 4 * (sum(p.numel() for p in tiny.parameters()) + 1000)


def test_what_the_process_has_resident_counts_once():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0).eval()
    before = estimate_memory(adapt(model, ImageInputs(32)), nsamples=1, batch_size=1, factors=0, compression=0.5)
    data = torch.ones(100_000_000, dtype=torch.uint8)
    after = estimate_memory(adapt(model, ImageInputs(32)), nsamples=1, batch_size=1, factors=0, compression=0.5)
    assert after.process - before.process == pytest.approx(data.nbytes, rel=0.2)
    assert before.process + before.model - CODE_BYTES == pytest.approx((resident_memory() or 0) - data.nbytes, rel=0.1)


def test_memory_of_what_is_kept(tiny):
    """Inputs of qkv, proj, fc1 and fc2, the residual stream twice, and what attention puts out."""
    two = estimate_memory(
        adapt(tiny, ImageInputs(32)), nsamples=100, batch_size=8, factors=0, compression=0.5, level="full", paths=2
    )
    one = estimate_memory(adapt(tiny, ImageInputs(32)), nsamples=100, batch_size=8, factors=0, compression=0.5, level="full")
    assert two.kept == 100 * 17 * (3 * 48 + 192 + 3 * 48) * 4
    assert two.hidden == 2 * one.hidden
    assert two.block - 12 * 192**2 == 2 * (one.block - 12 * 192**2)
    assert two.statistics == 8 * (192**2 + 192 * 48)  # of one layer at a time, with cross moments
    at_work = two.hidden + two.kept + two.statistics + max(two.block, two.solver)
    assert two.total == two.process + two.model + at_work


def test_passes_by_hand(tiny):
    """Of the 12 d^2 weights of a block, qkv has 3, proj 1, fc1 and fc2 4 each."""
    adapter = adapt(tiny, ImageInputs(32))
    assert count_passes(adapter.blocks, "block", keep=False) == 2
    assert count_passes(adapter.blocks, "sequential", keep=False) == 5
    assert count_passes(adapter.blocks, "residual", keep=False) == 2 * (1 + (0 + 3 + 4 + 8) / 12)


@pytest.mark.parametrize(
    ("method", "config"),
    [
        ("oats-h", OATSHConfig(compression=0.6, solver="admm", iterations=20)),
        ("oats-h", OATSHConfig(compression=0.6, solver="support", iterations=20)),
        ("oats", OATSConfig(compression=0.6, iterations=20, tolerance=0)),
    ],
    ids=["admm", "support", "oats"],
)
@pytest.mark.parametrize("target", ["block", "residual"])
def test_arithmetic_is_an_upper_bound_and_not_a_wild_one(target, method, config):
    """Against torch's own count of what was multiplied."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, num_classes=4).eval()
    images = torch.randn(16, 3, 64, 64)
    job = job_of(method, config, batch_size=64, target=target, refit_bias=True)
    stated = plan_compression(adapt(model, ImageInputs(64)), job, 16).work.total
    with FlopCounterMode(display=False) as counter:
        compress_in_place(model, images, job)
    done = counter.get_total_flops() / 2  # torch counts multiplications and additions
    assert done < stated < 3 * done
