"""The ladder of targets, against plain hooks on whole models and least squares by another way."""

import copy

import pytest
import torch

from tests.calibration.states import collect, scaled
from tests.conftest import make_tiny
from tests.in_place import compress_in_place, job_of
from vitoats.calibration import targets
from vitoats.calibration.moments import full_statistics, input_statistics, sums
from vitoats.calibration.targets import OutputError, calibration_for, corrected
from vitoats.methods.magnitude import MagnitudeConfig
from vitoats.methods.oats_h import OATSHConfig, oats_h
from vitoats.methods.statistics import InputStatistics

import timm  # isort: skip


def run(model, images, target, refit_bias=False, compression=0.5, method="magnitude"):
    config = {"magnitude": MagnitudeConfig, "oats-h": OATSHConfig}[method](compression=compression)
    return compress_in_place(model, images, job_of(method, config, target=target, refit_bias=refit_bias))


def hidden_after(model, images, block):
    found = []
    handle = model.blocks[block].register_forward_hook(lambda _m, _a, out: found.append(out))
    with torch.inference_mode():
        model(images)
    handle.remove()
    return found[0]


@pytest.mark.parametrize("refit_bias", [False, True])
def test_corrected_weights_are_the_ridge_regression_of_the_target(refit_bias):
    """Restated as one least-squares problem with the ridge as further rows, in float64."""
    X = torch.randn(200, 6, dtype=torch.float64) @ torch.randn(6, 6, dtype=torch.float64) + 1
    E = X @ torch.randn(6, 3, dtype=torch.float64) + torch.randn(200, 3, dtype=torch.float64) + 2
    W, b = torch.randn(3, 6, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    error = OutputError(E.T @ X / 200, E.mean(dim=0))
    got, bias = corrected(W, b, InputStatistics.of(X), error, refit_bias)
    inputs = X - X.mean(dim=0) if refit_bias else X
    ridge = 0.01 * (inputs.square().sum(dim=0) / 200).mean()
    left = torch.cat([inputs, (200 * ridge).sqrt() * torch.eye(6)])
    right = torch.cat([E - E.mean(dim=0) if refit_bias else E, torch.zeros(6, 3, dtype=torch.float64)])
    dW = torch.linalg.lstsq(left, right).solution.T
    assert torch.allclose(got, W + dW)
    expected = b + E.mean(dim=0) - dW @ X.mean(dim=0) if refit_bias else b
    assert torch.allclose(bias, expected)


@pytest.mark.parametrize("target", ["sequential", "dense", "residual"])
def test_nothing_removed_changes_nothing(target):
    images = torch.randn(8, 3, 32, 32)
    model, dense = scaled(), scaled()
    run(model, images, target, refit_bias=True, compression=0.0)
    with torch.inference_mode():
        assert torch.allclose(model(images), dense(images), atol=1e-4)


def test_the_first_layer_has_no_error_and_later_ones_see_compressed_inputs():
    """Target "sequential" restated: magnitude pruning does not look at inputs, but the refitted bias does."""
    images = torch.randn(8, 3, 32, 32)
    model, reference = make_tiny(), make_tiny()
    run(model, images, "sequential", refit_bias=True)
    for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
        layer, compressed = reference.blocks[0].get_submodule(name), model.blocks[0].get_submodule(name)
        seen = []
        handle = layer.register_forward_pre_hook(lambda _m, args, seen=seen: seen.append(args[0]))
        with torch.inference_mode():
            reference(images)
        handle.remove()
        mean = seen[0].reshape(-1, layer.in_features).mean(dim=0)
        expected = layer.bias + (layer.weight - compressed.weight) @ mean
        assert torch.allclose(compressed.bias, expected, atol=1e-4), name
        layer.weight.data, layer.bias.data = compressed.weight.detach(), compressed.bias.detach()


def test_of_many_tokens_every_second_is_measured_from_another_start_in_each_batch(monkeypatch):
    """4 batches of 2 images of 17 tokens: the tokens 0, 2, ... of the first and third, 1, 3, ... of the others."""
    monkeypatch.setattr(targets, "TOKENS_PER_INPUT", 1)  # of 48 inputs and 136 tokens
    images = torch.randn(8, 3, 32, 32)
    model, dense = scaled(), scaled()
    adapter, hidden = collect(model, images, batch_size=2)
    block = adapter.blocks[0]
    calibration = calibration_for("residual", hidden, "full", keep=True)
    calibration.enter(block, block.linears)
    qkv, proj = block.linears[:2]
    calibration.measure(qkv)
    model.blocks[0].attn.qkv.weight.data *= 0.9
    calibration.finish(qkv)
    statistics, error = calibration.measure(proj)
    assert proj.name == "blocks.0.attn.proj"

    inputs = {model: [], dense: []}
    for network, seen in inputs.items():
        network.blocks[0].attn.proj.register_forward_pre_hook(lambda _m, args, seen=seen: seen.append(args[0]))
        with torch.inference_mode():
            network(images)
    start = torch.arange(4).repeat_interleave(2 * 17)  # batch of each token
    picked = (torch.arange(2 * 17).repeat(4) - start) % 2 == 0
    x, x_d = (inputs[network][0].reshape(-1, 48)[picked].double() for network in (model, dense))
    assert torch.allclose(statistics.H, x.T @ x / len(x), atol=1e-5)
    expected = (x_d - x) @ dense.blocks[0].attn.proj.weight.T.double()
    assert torch.allclose(error.cross, expected.T @ x / len(x), atol=1e-5)
    assert torch.allclose(error.mean, expected.mean(dim=0), atol=1e-5)


def test_each_step_of_the_ladder_brings_hidden_states_nearer():
    images = torch.randn(32, 3, 32, 32)
    dense = hidden_after(scaled(), images, 2)
    errors = {}
    for target in ("sequential", "dense", "residual"):
        model = scaled()
        run(model, images, target, refit_bias=True, compression=0.6, method="oats-h")
        errors[target] = (hidden_after(model, images, 2) - dense).square().mean().item()
    assert errors["residual"] < errors["dense"] < errors["sequential"]


def test_an_interrupted_run_goes_on_with_the_same_dense_path(tmp_path):
    from vitoats.compression.resume import BlockStore

    images = torch.randn(8, 3, 32, 32)
    whole = make_tiny()
    run(whole, images, "residual", refit_bias=True)
    store = BlockStore(tmp_path / "state", "x", resume=False)
    job = job_of("magnitude", MagnitudeConfig(), target="residual", refit_bias=True)
    for _ in range(2):  # the second run finds the first one's blocks, and the last of them gone
        model = make_tiny()
        compress_in_place(model, images, job, state=store)
        (tmp_path / "state" / "block_2.safetensors").unlink()
    for name, parameter in whole.state_dict().items():
        assert torch.allclose(parameter, model.state_dict()[name], atol=1e-5), name


def test_a_method_without_biases_to_refit_keeps_working():
    images = torch.randn(8, 3, 32, 32)
    model = make_tiny()
    for block in model.blocks:
        block.attn.qkv.bias = None
    run(model, images, "residual", refit_bias=True)
    assert "blocks.0.attn.qkv.bias" not in model.state_dict()
    with torch.inference_mode():
        assert torch.isfinite(model(images)).all()


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("swin_tiny_patch4_window7_224", {"embed_dim": 24, "depths": (1, 1), "num_heads": (2, 4), "window_size": 4}),
        ("hiera_tiny_224", {"embed_dim": 24, "stages": (1, 1), "num_heads": 1, "q_pool": 1}),
        ("beit_base_patch16_224", {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}),
    ],
)
def test_models_whose_hidden_states_change_shape(name, arguments):
    images = torch.randn(8, 3, 32, 32)
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=32, num_classes=4, **arguments).eval()
    for parameter in model.parameters():  # some heads start at zero
        parameter.data += 0.05 * torch.randn_like(parameter)
    dense = copy.deepcopy(model)
    run(model, images, "residual", refit_bias=True, compression=0.3, method="oats-h")
    with torch.inference_mode():
        assert torch.isfinite(model(images)).all()
        assert (model(images) - dense(images)).norm() < 0.5 * dense(images).norm()


@pytest.mark.parametrize("target", ["block", "sequential"])
def test_each_layer_is_measured_before_it_is_compressed_and_after_those_before_it(tiny, target):
    """Halving qkv shows in what proj gets, unless the whole block is measured dense."""
    adapter, hidden = collect(tiny, torch.randn(4, 3, 32, 32))
    block = adapter.blocks[0]
    qkv, proj = block.linears[:2]
    dense = input_statistics(hidden, block)
    calibration = calibration_for(target, hidden, "diagonal", keep=False)
    calibration.enter(block, block.linears)
    first, error = calibration.measure(qkv)
    qkv.module.weight.data *= 0.5
    calibration.finish(qkv)
    second, _ = calibration.measure(proj)
    assert error is None
    assert torch.equal(first.second_moment, dense[qkv.name].second_moment)
    assert torch.equal(second.second_moment, dense[proj.name].second_moment) == (target == "block")


@pytest.mark.parametrize("target", ["block", "sequential", "dense", "residual"])
def test_blocks_without_linear_layers_are_passed(target):
    """A convolution leads from one of ConvNeXt's stages to the next."""
    torch.manual_seed(0)
    model = timm.create_model("convnext_tiny", depths=(1, 1, 1, 1), dims=(16, 16, 32, 32), num_classes=4).eval()
    images = torch.randn(4, 3, 32, 32)
    report = run(model, images, target, refit_bias=True)
    assert len(report.layers) == 8
    with torch.inference_mode():
        assert torch.isfinite(model(images)).all()


@pytest.mark.parametrize("spread", [0.0, 1e-8, 1e-6, 1e-4, 1e-3])
@pytest.mark.parametrize("width", [4, 64])
def test_inputs_that_hardly_vary_have_no_singular_moments(spread, width):
    """Sums in float32 leave less of their variance than of their mean, or nothing (CaiT's attention over its heads)."""
    x = (0.005 * (1 + spread * torch.randn(20000, width))).float()
    e = torch.randn(20000, 8)
    shift = x[:100].mean(dim=0)
    H, mean = (total.double() / len(x) for total in sums(x, shift))
    statistics = full_statistics(H, mean, shift)
    error = OutputError((e.T @ x).double() / len(x), e.double().mean(dim=0))
    weight, bias = corrected(torch.randn(8, width), torch.zeros(8), statistics, error, refit_bias=True)
    assert torch.isfinite(weight).all()
    assert torch.isfinite(bias).all()
    found = oats_h(weight, statistics.centred(), OATSHConfig(iterations=5))
    assert torch.isfinite(found.S).all()
    assert 0 <= found.relative_error < 2


def test_inputs_that_vary_keep_their_moments():
    X = torch.randn(1000, 8).double() + 3
    statistics = InputStatistics.of(X)
    assert torch.equal(statistics.centred().full, statistics.full - torch.outer(statistics.mean, statistics.mean))
