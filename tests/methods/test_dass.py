"""DaSS against its formula, on matrices and on whole gated models; what it leaves dense and what it refuses."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vitoats.common.torchvision_ops  # noqa: F401  (before timm)
from tests.conftest import make_tiny
from tests.in_place import compress_in_place, job_of
from vitoats.calibration.hidden_states import HiddenStates
from vitoats.calibration.moments import input_statistics
from vitoats.common.errors import InputError
from vitoats.format.layers import compressed_layers
from vitoats.methods.dass import DaSSConfig, dass
from vitoats.methods.magnitude import MagnitudeConfig, magnitude
from vitoats.methods.statistics import InputStatistics
from vitoats.methods.wanda import WandaConfig, wanda
from vitoats.models.adapter import adapt
from vitoats.models.inputs import ImageInputs

import timm  # isort: skip

SEEDS = st.integers(0, 10**6)


def problem(seed: int, n: int, d_in: int, parts: int = 1):
    """Weights [parts * n, d_in] and statistics with the mean squares of n neurons."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(parts * n, d_in, generator=generator)
    moments, neurons = torch.randn(2, max(n, d_in), generator=generator).double().exp()
    return weight, InputStatistics(moments[:d_in], neurons=neurons[:n])


def make_gated(name: str = "vit_giant_patch14_dinov2", **kwargs) -> torch.nn.Module:
    """2 blocks, width 48, MLPs with a gate: one matrix of gate and up in DINOv2-giant, two in others."""
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=28, embed_dim=48, depth=2, num_heads=3, num_classes=4, **kwargs).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


@settings(deadline=None, max_examples=40)
@given(
    seed=SEEDS,
    parts=st.integers(1, 2),
    compression=st.floats(0.05, 0.9),
    power=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_each_column_keeps_its_highest_scores(seed, parts, compression, power):
    """Restated column by column, gate and up apart; int(n * rho) go, and no weight changes."""
    n = 16
    weight, statistics = problem(seed, n, 6, parts)
    got = dass(weight, statistics, DaSSConfig(compression=compression, power=power)).S
    for part, kept in zip(weight.split(n), (got != 0).split(n), strict=True):
        for j in range(6):
            score = part[:, j].double().abs() * statistics.neurons ** (power / 2)
            gone = score.argsort()[: int(n * compression)]
            assert set((~kept[:, j]).nonzero().flatten().tolist()) == set(gone.tolist())
    assert torch.equal(got[got != 0], weight[got != 0])


@settings(deadline=None, max_examples=30)
@given(seed=SEEDS, pattern=st.sampled_from([(2, 4), (1, 4), (4, 8)]))
def test_n_of_m_lies_along_the_neurons(seed, pattern):
    n, m = pattern
    weight, statistics = problem(seed, 16, 6, 2)
    got = dass(weight, statistics, DaSSConfig(compression=None, pattern=f"{n}:{m}")).S
    score = weight.double().abs() * statistics.neurons.repeat(2)[:, None] ** 0.25
    groups = (got != 0).T.reshape(6, -1, m)
    assert (groups.sum(dim=2) == n).all()
    kept = score.T.reshape(6, -1, m).masked_fill(~groups, float("inf")).amin(dim=2)
    gone = score.T.reshape(6, -1, m).masked_fill(groups, 0).amax(dim=2)
    assert (kept >= gone).all()


def test_special_cases():
    """power 0, or neurons that all do the same: magnitude by columns. Layers that make no neurons: Wanda."""
    weight, statistics = problem(1, 16, 8)
    by_columns = magnitude(weight.T, InputStatistics(torch.ones(16).double()), MagnitudeConfig(pattern="row")).S.T
    assert torch.equal(dass(weight, statistics, DaSSConfig(power=0.0)).S, by_columns)
    even = dataclasses.replace(statistics, neurons=torch.full((16,), 3.0).double())
    assert torch.equal(dass(weight, even, DaSSConfig()).S, by_columns)
    assert not torch.equal(dass(weight, statistics, DaSSConfig()).S, by_columns)
    down = dataclasses.replace(statistics, neurons=None)
    assert torch.equal(dass(weight, down, DaSSConfig()).S, wanda(weight, down, WandaConfig()).S)


def test_groups_of_rows_would_be_magnitude_and_columns_are_not():
    """The factor is the same along a row: only columns as groups let weak neurons lose."""
    weight, statistics = problem(2, 16, 8)
    score = weight.double().abs() * statistics.neurons[:, None] ** 0.25
    assert torch.equal(score.argsort(dim=1), weight.abs().argsort(dim=1))
    kept = (dass(weight, statistics, DaSSConfig()).S != 0).sum(dim=1).double()
    assert torch.corrcoef(torch.stack([kept, statistics.neurons.log()]))[0, 1] > 0.5
    assert kept.min() < kept.max()


def run(model, images, **options):
    return compress_in_place(model, images, job_of("dass", DaSSConfig(**options)))


def neurons_of(model, images, block: int) -> torch.Tensor:
    """Mean squares of what fc2 reads, by a hook on a whole forward pass."""
    caught = []
    handle = model.blocks[block].mlp.fc2.register_forward_pre_hook(lambda _m, args: caught.append(args[0]))
    with torch.inference_mode():
        model(images)
    handle.remove()
    return caught[0].double().flatten(0, 1).square().mean(dim=0)


@pytest.mark.parametrize("kwargs", [{}, {"pattern": "2:4", "compression": None}, {"attention": "wanda"}])
def test_a_packed_gated_model(kwargs):
    """fc1 of block 0 from the formula with hooks; attention is dense unless asked for; the figures count what was pruned."""
    images = torch.randn(8, 3, 28, 28)
    dense, model = make_gated(), make_gated()
    report = run(model, images, **kwargs)
    neurons = neurons_of(dense, images, 0)
    weight = dense.blocks[0].mlp.fc1.weight.data
    expected = dass(weight, InputStatistics(torch.ones(48).double(), neurons=neurons), DaSSConfig(**kwargs)).S
    got = model.blocks[0].mlp.fc1.S
    assert ((got != 0) == (expected != 0)).float().mean() > 0.999
    compressed = {name.split(".", 2)[2] for name in compressed_layers(model)}
    attention = kwargs.get("attention") == "wanda"
    assert compressed == {"mlp.fc1", "mlp.fc2"} | ({"attn.qkv", "attn.proj"} if attention else set())
    left = [name for name, reason in report.skipped if reason == "DaSS prunes MLPs only"]
    assert len(left) == (0 if attention else 4)
    assert report.compression == pytest.approx(0.5)
    with torch.inference_mode():
        assert torch.isfinite(model(images)).all()


def test_gate_and_up_in_two_layers():
    """EVA-02's SwiGLU: both get the neurons that fc2 sees."""
    model = make_gated("eva02_base_patch14_224")
    adapter = adapt(model, ImageInputs(28))
    images = torch.randn(4, 3, 28, 28)
    hidden = HiddenStates.collect(adapter, iter([images]), 4, 4)
    found = input_statistics(hidden, adapter.blocks[0], "neurons")
    expected = neurons_of(model, images, 0)
    for part in ("g", "x"):
        assert torch.allclose(found[f"blocks.0.mlp.fc1_{part}"].neurons, expected, rtol=1e-4)
    assert found["blocks.0.mlp.fc2"].neurons is None
    run(model, images)
    kept = model.blocks[0].mlp.fc1_g.S != 0
    assert (kept.sum(dim=0) == len(kept) // 2).all()


def test_a_plain_mlp_only_when_asked():
    images = torch.randn(8, 3, 32, 32)
    with pytest.raises(InputError, match="plain=true"):
        run(make_tiny(), images)
    model, dense = make_tiny(), make_tiny()
    run(model, images, plain=True)
    expected = InputStatistics(torch.ones(48).double(), neurons=neurons_of(dense, images, 0))
    got = dass(dense.blocks[0].mlp.fc1.weight.data, expected, DaSSConfig(plain=True)).S
    assert ((model.blocks[0].mlp.fc1.S != 0) == (got != 0)).float().mean() > 0.999


@pytest.mark.parametrize(
    ("options", "said"),
    [({"power": -1.0}, "power=0.5"), ({"attention": "sparse"}, "dense or wanda"), ({"compression": 2}, "rho|share")],
)
def test_settings_out_of_range_are_refused(options, said):
    with pytest.raises(InputError, match=said):
        DaSSConfig(**options)
