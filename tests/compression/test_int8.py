"""Compression to int8: layers see quantized inputs, rounding comes last, and folders and blocks keep what was rounded."""

import copy
import json

import pytest
import torch
from torch import nn

import vitoats
from tests.calibration.states import collect
from tests.conftest import make_tiny
from tests.in_place import compress_in_place, job_of
from vitoats.cli.compress import main as compress_command
from vitoats.common.errors import InputError
from vitoats.compression.layer import compress_layer, int8_linear
from vitoats.compression.resume import BlockStore
from vitoats.compression.run import draw_images
from vitoats.compression.settings import make_job
from vitoats.compression.smoothing import smooth
from vitoats.compression.structural import prune
from vitoats.evaluation.fidelity import relative_error
from vitoats.format.int8 import fake_quantized
from vitoats.format.int8_layers import Int8Linear, Int8SparseLowRankLinear, int8_linears, to_int8
from vitoats.format.layers import SparseLowRankLinear, compressed_layers
from vitoats.loading.checkpoint import save_checkpoint
from vitoats.loading.load import from_memory, load_model
from vitoats.methods.magnitude import MagnitudeConfig
from vitoats.methods.mrp import MRPConfig
from vitoats.methods.numerical import NumericalConfig
from vitoats.methods.oats import OATSConfig
from vitoats.methods.quantization import quantized
from vitoats.methods.registry import get_method
from vitoats.methods.statistics import InputStatistics
from vitoats.models.adapter import adapt
from vitoats.models.blocks import LinearLayer
from vitoats.models.inputs import ImageInputs
from vitoats.models.units import kept_units

IMAGES = torch.randn(9, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def run(model, method="oats", config=None, *, int8=True, target="block", refit_bias=False, **work):
    config = config or OATSConfig(compression=0.5, rank_ratio=0.25, iterations=6)
    job = job_of(method, config, int8=int8, target=target, refit_bias=refit_bias)
    return compress_in_place(model, IMAGES, job, **work)


def problem(bias=True, d_out=8, d_in=24):
    layer = LinearLayer(torch.nn.Sequential(torch.nn.Linear(d_in, d_out, bias=bias)).requires_grad_(False), "0", 1)
    return layer, fake_quantized(torch.randn(400, d_in) @ torch.randn(d_in, d_in) + 1)


# ---- one layer


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_is_the_solution_of_its_method_rounded(bias):
    layer, X = problem(bias)
    config = MRPConfig(compression=0.5)
    made, row = compress_layer(layer, InputStatistics.of(X), None, get_method("mrp"), config, refit_bias=True, int8=True)
    moments = InputStatistics.of(X).centred() if bias else InputStatistics.of(X)
    weight = layer.module.weight
    expected = quantized(weight, moments, get_method("mrp").solve(weight, moments, config), config.damping)
    assert isinstance(made, Int8SparseLowRankLinear)
    assert torch.equal(made.S_int8, expected.S[0])
    assert torch.equal(made.S_scale, expected.S[1])
    assert (row.nonzeros, row.kept_parameters) == (made.nonzeros, made.kept_parameters)
    assert row.solver_error == pytest.approx(expected.error.relative_error)
    if bias:  # it makes up for the mean output of what both the method and the rounding have lost
        assert torch.allclose((X @ made.weight.T + made.bias).mean(dim=0), layer.module(X).mean(dim=0), atol=1e-4)


def test_where_nothing_is_removed_the_layer_is_dense():
    layer, X = problem()
    made, row = compress_layer(layer, InputStatistics.of(X), None, get_method("mrp"), MRPConfig(compression=0.0), True, True)
    assert isinstance(made, Int8Linear)
    assert (row.kept_parameters, row.ranks) == (8 * 24, (0,))
    assert (made(X) - layer.module(X)).norm() < 0.02 * layer.module(X).norm()


def test_a_layer_that_would_be_larger_than_its_dense_matrix_keeps_all():
    """At 10 % the mask, an eighth of the matrix, takes more than the removed values."""
    layer, X = problem()
    config = MagnitudeConfig(compression=0.1)
    made, row = compress_layer(layer, InputStatistics.of(X), None, get_method("magnitude"), config, True, int8=True)
    assert isinstance(made, Int8Linear)
    assert row.kept_parameters == 8 * 24


@pytest.mark.parametrize("bias", [True, False])
def test_rounding_a_dense_layer(bias):
    layer, X = problem(bias)
    made = int8_linear(layer.module, InputStatistics.of(X))
    assert (made(X) - layer.module(X)).norm() < 0.02 * layer.module(X).norm()
    if bias:
        assert torch.allclose(made(X).mean(dim=0), layer.module(X).mean(dim=0), atol=1e-4)


# ---- whole models


@pytest.mark.parametrize("target", ["block", "sequential", "dense", "residual"])
def test_int8_is_nearly_as_good_as_float(target):
    dense, float32, int8 = make_tiny(), make_tiny(), make_tiny()
    config = MRPConfig(compression=0.3)
    run(float32, "mrp", config, target=target, refit_bias=True, int8=False)
    report = run(int8, "mrp", config, target=target, refit_bias=True)
    assert {type(layer) for layer in compressed_layers(int8).values()} == {Int8SparseLowRankLinear}
    with torch.inference_mode():
        lost = [(model(IMAGES) - dense(IMAGES)).norm() / dense(IMAGES).norm() for model in (float32, int8)]
    assert lost[1] < 1.15 * lost[0] + 0.01
    assert report.compression == pytest.approx(0.3, abs=0.01)


def test_layers_are_calibrated_on_quantized_inputs():
    """The second moments of the first layer, restated."""
    model = make_tiny()
    run(model, config=OATSConfig(compression=0.5, iterations=6))
    other = make_tiny()
    adapter, hidden = collect(other, IMAGES)
    smooth(adapter.blocks[0], hidden, [layer.name for layer in adapter.blocks[0].linears])
    with torch.inference_mode():
        x = other.blocks[0].norm1(other._pos_embed(other.patch_embed(IMAGES))).reshape(-1, 48)
    layer = LinearLayer(other, "blocks.0.attn.qkv", 3)
    moments = InputStatistics(fake_quantized(x).double().square().mean(dim=0))
    expected, _ = compress_layer(
        layer, moments, None, get_method("oats"), OATSConfig(compression=0.5, iterations=6), False, True
    )
    found = compressed_layers(model)["blocks.0.attn.qkv"]
    assert torch.allclose(found.weight, expected.weight, atol=1e-3)


@pytest.mark.parametrize(
    ("method", "config"),
    [
        ("oats", OATSConfig(compression=0.5, rank_ratio=0.0, iterations=2)),
        ("oats", OATSConfig(compression=0.5, rank_ratio=1.0, iterations=2)),
        ("oats", OATSConfig(compression=None, pattern="2:4", iterations=2)),
        ("magnitude", MagnitudeConfig(compression=0.7)),
        ("mrp", MRPConfig(compression=0.0)),
    ],
    ids=["S only", "UV only", "2:4", "magnitude", "dense"],
)
def test_a_folder_gives_back_what_was_rounded(tmp_path, method, config):
    loaded = from_memory(make_tiny())
    report = run(loaded.timm_model, method, config)
    save_checkpoint(loaded, tmp_path / "out", report.to_dict())
    model = vitoats.load(tmp_path / "out")
    expected, found = loaded.model.state_dict(), model.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[key], value) and found[key].dtype == value.dtype for key, value in expected.items())
    assert torch.equal(model(IMAGES), loaded.model(IMAGES))
    said = json.loads((tmp_path / "out" / "vitoats.json").read_text())
    assert said["format_version"] == 2
    values = sum(layer.kept_parameters for layer in (*compressed_layers(model).values(), *int8_linears(model).values()))
    others = sum(
        p.numel()
        for name, p in make_tiny().named_parameters()
        if not ("blocks" in name and "weight" in name and "norm" not in name)
    )
    assert said["counts"]["parameters"] == values + others  # no masks, no scales
    file = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert said["counts"]["bytes"] == len(file) - 8 - int.from_bytes(file[:8], "little")
    with pytest.raises(InputError, match="compressed already"):
        adapt(model, ImageInputs(32))


def test_the_dense_format_folds_the_rounded_weights(tmp_path):
    loaded = from_memory(make_tiny())
    report = run(loaded.timm_model)
    save_checkpoint(loaded, tmp_path / "out", report.to_dict(), dense=True)
    model = vitoats.load(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "vitoats.json").read_text())["format_version"] == 1
    for name, layer in compressed_layers(loaded.timm_model).items():
        assert torch.equal(model.get_submodule(name).weight, layer.weight)


@pytest.mark.parametrize("compression", [0.5, 0.0])
def test_an_interrupted_run_goes_on_with_its_rounded_blocks(tmp_path, compression):
    whole, config = make_tiny(), OATSConfig(compression=compression, iterations=4)
    run(whole, config=config)

    def stop(block, _n, what):
        if block == 2 and what == "calibrating":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(make_tiny(), config=config, state=BlockStore(tmp_path / "state", "same", resume=False), progress=stop)
    again = make_tiny()
    run(again, config=config, state=BlockStore(tmp_path / "state", "same", resume=True))
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in again.state_dict().items())


@pytest.mark.parametrize("compensation", ["sequential", "dense"])
def test_a_pruned_model_is_rounded_behind(tmp_path, compensation):
    loaded, float32 = from_memory(make_tiny()), make_tiny()
    config = NumericalConfig(compression=0.4, compensation=compensation)
    for model, int8 in ((float32, False), (loaded.timm_model, True)):
        job = job_of("numerical", config, int8=int8)
        report = prune(adapt(model, ImageInputs(32)), job, iter(IMAGES.split(3)), len(IMAGES))
    assert kept_units(loaded.timm_model) == kept_units(float32)
    assert len(int8_linears(loaded.timm_model)) == 12
    with torch.inference_mode():
        dense = make_tiny()(IMAGES)
        lost = [(model(IMAGES) - dense).norm() for model in (float32, loaded.timm_model)]
    assert lost[1] < 1.1 * lost[0]
    save_checkpoint(loaded, tmp_path / "out", report.to_dict())
    assert torch.equal(vitoats.load(tmp_path / "out")(IMAGES), loaded.model(IMAGES))


# ---- commands


def test_the_flag_writes_a_folder_of_version_2(succeed, job, plain, tmp_path):
    said = succeed(compress_command, *job, "--weights", "int8")
    about = json.loads((tmp_path / "out" / "vitoats.json").read_text())
    assert (said["weights"], about["format_version"], about["weight_type"]) == ("int8", 2, "int8")
    before = json.loads((plain / "vitoats.json").read_text())
    assert (before["format_version"], "weight_type" in before) == (1, False)
    assert about["counts"]["bytes"] < 0.6 * before["counts"]["bytes"]
    assert about["flops"] <= before["flops"]


def test_the_flag_and_the_python_api_agree(succeed, job, tiny_folder, flat_images, tmp_path):
    succeed(compress_command, *job, "--weights", "int8")
    made = vitoats.compress(
        f"local-dir:{tiny_folder}", flat_images, method="oats", iterations=4, nsamples=16, threads=1, weights="int8"
    )
    made.save(tmp_path / "other")
    assert (tmp_path / "other/model.safetensors").read_bytes() == (tmp_path / "out/model.safetensors").read_bytes()


@pytest.mark.parametrize(("flags", "said"), [(["--weights", "int4"], "invalid choice"), (["--weights"], "expected one")])
def test_other_weights_are_refused(refuse, job, flags, said):
    assert said in refuse(compress_command, *job, *flags)
    with pytest.raises(InputError, match="`weights` takes"):
        vitoats.compress("dinov2s_derived", weights="int4")


def test_a_folder_of_a_newer_version_is_refused_with_the_remedy(plain, tmp_path):
    folder = tmp_path / "newer"
    folder.mkdir()
    for file in plain.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    about = json.loads((folder / "vitoats.json").read_text())
    (folder / "vitoats.json").write_text(json.dumps(about | {"format_version": 3}))
    with pytest.raises(InputError, match="has format version 3, this vitoats reads 2: update vitoats"):
        load_model(str(folder))


# ---- layers rounded without data


def test_a_dense_model_rounded_without_data_is_close():
    dense = make_tiny().requires_grad_(False)
    model = copy.deepcopy(dense)
    for name in [layer.name for layer in adapt(model, ImageInputs(32)).linears]:
        model.set_submodule(name, to_int8(model.get_submodule(name)))
    with torch.inference_mode():
        assert (model(IMAGES) - dense(IMAGES)).norm() < 0.05 * dense(IMAGES).norm()


@torch.inference_mode()
def test_int8_on_a_real_backbone():
    """The embedded DINOv2-S-derived one, on images of the sample: dense, and with half of all weights, of the same support."""
    loaded = load_model("dinov2s_derived", with_head=False)
    held_out = draw_images(make_job("dinov2s_derived", nsamples=4), loaded).held_out["own"]
    images = torch.stack([held_out[i][0] for i in range(16)])
    forms: dict[str, list[nn.Module]] = {"dense": [], "sparse": []}
    for form, models in forms.items():
        model = copy.deepcopy(loaded.timm_model)
        for layer in adapt(model, loaded.inputs).linears if form == "sparse" else ():
            weight = layer.module.weight.detach()
            S = torch.where(weight.abs() > weight.abs().median(), weight, 0)
            none = [torch.zeros(len(S), 0)], [torch.zeros(0, S.shape[1])]
            model.set_submodule(layer.name, SparseLowRankLinear(S, *none, layer.module.bias))
        rounded = copy.deepcopy(model)
        for name in [x.name for x in adapt(copy.deepcopy(loaded.timm_model), loaded.inputs).linears]:
            rounded.set_submodule(name, to_int8(rounded.get_submodule(name)))
        models += [model, rounded]
    for form, models in forms.items():
        float32, int8 = (model(images).numpy() for model in models)
        assert relative_error(int8, float32) < 0.02, form
