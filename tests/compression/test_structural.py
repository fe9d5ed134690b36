"""Heads and neurons removed for real: the small model is the masked one, and goes through all files."""

import copy
import json
import re

import numpy as np
import pytest
import torch

import vitoats
import vitoats.common.torchvision_ops  # (before timm)
from tests.conftest import make_tiny
from tests.in_place import compress_in_place, job_of
from vitoats.cli import common
from vitoats.cli.compress import main as compress_command
from vitoats.cli.export_onnx import main as export_command
from vitoats.common.errors import InputError
from vitoats.compression import structural
from vitoats.compression.resume import RunFolder
from vitoats.compression.structural import prune
from vitoats.methods.numerical import NumericalConfig, compensated, cut, numerical
from vitoats.methods.oats import OATSConfig
from vitoats.methods.statistics import InputStatistics
from vitoats.models.adapter import adapt
from vitoats.models.flops import count_flops
from vitoats.models.inputs import ImageInputs
from vitoats.models.units import find_units, keep_units, kept_units
from vitoats.runtime import session

import timm  # isort: skip

SMALL = {"embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 4}


def create(name: str, img_size: int, **kwargs) -> torch.nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=img_size, **SMALL, **kwargs).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def run(model, images, compression=0.4, **options):
    job = job_of("numerical", NumericalConfig(compression=compression, **options))
    return prune(adapt(model, ImageInputs(images.shape[-1])), job, iter(images.split(3)), len(images))


def inputs(model, names, images) -> dict[str, torch.Tensor]:
    """What layers read in one whole forward pass, [n_tokens, d_in]."""
    caught = {}
    handles = [
        model.get_submodule(n).register_forward_pre_hook(lambda _m, args, n=n: caught.update({n: args[0].flatten(0, -2)}))
        for n in names
    ]
    with torch.inference_mode():
        model(images)
    for handle in handles:
        handle.remove()
    return caught


@pytest.mark.parametrize(
    ("name", "img_size", "kwargs", "kinds"),
    [
        ("vit_tiny_patch16_224", 32, {}, "heads neurons"),
        # norms of q and k, layer scale, no biases
        ("vit_tiny_patch16_224", 32, {"qk_norm": True, "init_values": 0.1}, "heads neurons"),
        ("vit_tiny_patch16_224", 32, {"qkv_bias": False, "proj_bias": False}, "heads neurons"),
        ("vit_small_patch14_reg4_dinov2", 28, {}, "heads neurons"),
        # gate and up in one matrix, and in two
        ("vit_giant_patch14_dinov2", 28, {}, "heads neurons"),
        ("eva02_base_patch14_224", 28, {"scale_mlp": False}, "neurons"),
        # norms after each part; rotary embedding; several attentions and MLPs in a block
        ("vit_relpos_medium_patch16_rpn_224", 32, {}, "neurons"),
        ("vit_base_patch16_rope_224", 32, {}, "heads neurons"),
        ("vit_small_patch16_18x2_224", 32, {}, "heads heads neurons neurons"),
    ],
)
def test_removed_units_are_silenced_units(name, img_size, kwargs, kinds):
    """A model without some units gives what the whole one gives with their output columns zeroed."""
    small = create(name, img_size, **kwargs)
    masked = copy.deepcopy(small)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, img_size, img_size)
    for i in range(2):
        found = [u for u in find_units(small, f"blocks.{i}") if u.kind in kinds and "rel_pos" not in u.module]
        assert sorted(u.kind for u in found) == kinds.split()
        for units in found:
            kept = torch.randperm(units.count, generator=generator)[: units.count // 2 + i].sort().values
            silent = torch.ones(units.count * units.width, dtype=torch.bool)
            silent[units.columns(kept)] = False
            masked.get_submodule(units.output).weight[:, silent] = 0
            keep_units(small, units, kept)
    with torch.inference_mode():
        assert torch.allclose(small(images), masked(images), rtol=1e-4, atol=1e-5)
    assert sum(p.numel() for p in small.parameters()) < 0.85 * sum(p.numel() for p in masked.parameters())


@pytest.mark.parametrize("compensation", ["sequential", "dense", "none"])
def test_the_way_through_the_blocks(compensation):
    """Restated with hooks on whole forward passes: scores of the dense model, then attention and MLP, block by block."""
    images = torch.randn(8, 3, 32, 32)
    config = NumericalConfig(compression=0.4, compensation=compensation)
    dense, model = make_tiny().requires_grad_(False), make_tiny()
    report = run(model, images, compensation=compensation)
    units = [u for b in range(3) for u in find_units(dense, f"blocks.{b}")]
    names = [u.output for u in units]
    seen = inputs(dense, names, images)
    scores = [
        numerical(dense.get_submodule(u.output).weight, InputStatistics.of(seen[u.output]), u.width, config) for u in units
    ]
    masks = cut(scores, [u.weights for u in units], config)
    expected = copy.deepcopy(dense)
    for u, mask, row in zip(units, masks, report.modules, strict=True):
        X = seen[u.output] if compensation == "dense" else inputs(expected, [u.output], images)[u.output]
        layer, kept = expected.get_submodule(u.output), mask.nonzero().flatten()
        weight, bias, error = compensated(layer.weight, layer.bias, InputStatistics.of(X), u.columns(kept), config)
        layer.weight.zero_()[:, u.columns(kept)] = weight
        layer.bias.copy_(bias)
        got = model.get_submodule(u.output)
        assert torch.allclose(got.weight, weight, atol=1e-4), u.output
        assert torch.allclose(got.bias, bias, atol=1e-4)
        assert (row.name, row.kept, row.before) == (u.module, len(kept), u.count)
        assert row.relative_error == pytest.approx(error, rel=1e-2, abs=1e-4)
    with torch.inference_mode():
        assert torch.allclose(model(images), expected(images), atol=1e-3)


def test_the_refit_brings_outputs_nearer():
    """The error of the first module, whose inputs are the same; and that of the whole model."""
    images = torch.randn(16, 3, 32, 32)
    with torch.inference_mode():
        reference = make_tiny()(images)
    errors, distances = [], []
    for options in ({"compensation": "none"}, {"refit_bias": False}, {}):
        model = make_tiny()
        errors.append(run(model, images, **options).modules[0].relative_error)
        with torch.inference_mode():
            distances.append((model(images) - reference).norm().item())
    assert errors[0] > errors[1] > errors[2]
    assert distances[0] > distances[2]


@pytest.mark.parametrize("compression", [0.1, 0.3, 0.5, 0.7])
def test_figures_by_hand(compression):
    model, images = make_tiny(), torch.randn(8, 3, 32, 32)
    report = run(model, images, compression=compression)
    weights = [
        model.get_submodule(f"blocks.{b}.{n}").weight for b in range(3) for n in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    ]
    left = sum(w.numel() for w in weights)
    assert sum(row.weights for row in report.modules) == left
    assert report.compression == pytest.approx(1 - left / (3 * 12 * 48 * 48))
    assert report.unit == pytest.approx(4 * 16 * 48 / (3 * 12 * 48 * 48))
    assert abs(report.compression - compression) <= report.unit / 2
    # multiply-adds of the linear layers that went: 17 tokens; and of attention, q k^T and the product with v
    heads = sum(row.before - row.kept for row in report.modules if row.kind == "heads")
    assert (
        count_flops(make_tiny(), ImageInputs(32)) - count_flops(model, ImageInputs(32))
        == 17 * (3 * 12 * 48 * 48 - left) + heads * 2 * 17 * 17 * 16
    )
    assert [row.kind for row in report.modules] == ["heads", "neurons"] * 3
    assert not [name for name, _ in report.skipped if name.startswith("blocks")]


def test_a_mapped_file_changes_nothing(tmp_path, monkeypatch):
    images = torch.randn(8, 3, 32, 32)
    first, second = make_tiny(), make_tiny()
    run(first, images)
    monkeypatch.setattr(structural, "plan_memory", lambda *_: tmp_path)  # no limit separates so few bytes from the process's
    run(second, images)
    for (name, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


class TestWhatCannotShrinkStays:
    def test_a_norm_over_neurons_and_heads_counted_in_forward(self):
        """EVA-02's MLPs norm all their neurons, and its attention expects the width of all heads."""
        with pytest.raises(InputError, match="no attention or MLP"):
            run(create("eva02_base_patch14_224", 28), torch.randn(4, 3, 28, 28))

    def test_attention_that_counts_heads_elsewhere(self):
        model = create("vit_relpos_small_patch16_224", 32)
        report = run(model, torch.randn(4, 3, 32, 32))
        assert {row.kind for row in report.modules} == {"neurons"}
        assert [row.name for row in report.modules] == ["blocks.0.mlp", "blocks.1.mlp"]  # and not that of the position bias
        assert "does not run with fewer heads" in dict(report.skipped)["blocks.0.attn.qkv"]
        with torch.inference_mode():
            assert model(torch.randn(2, 3, 32, 32)).shape == (2, 4)

    @pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"])
    def test_later_stages_are_tried_on_hidden_states_of_their_own_shape(self, name):
        """Their width and number of tokens differ from the first stage's."""
        sizes = {"img_size": 32, "embed_dim": 24, "depths": (1, 2), "num_heads": (2, 4), "window_size": 4}
        model, images = timm.create_model(name, num_classes=4, **sizes).eval(), torch.randn(6, 3, 32, 32)
        report = run(model, images, compression=0.3)
        assert [row.name for row in report.modules if row.kind == "neurons"] == [
            "layers.0.blocks.0.mlp",
            "layers.1.blocks.0.mlp",
            "layers.1.blocks.1.mlp",
        ]
        assert all(row.kept < row.before for row in report.modules)
        assert report.compression == pytest.approx(0.3, abs=report.unit)
        with torch.inference_mode():
            assert torch.isfinite(model(images)).all()

    def test_a_compressed_model(self):
        model, images = make_tiny(), torch.randn(4, 3, 32, 32)
        compress_in_place(model, images, job_of("oats", OATSConfig(iterations=2)))
        with pytest.raises(InputError, match="start from the dense one"):
            run(model, images)


class TestCommand:
    """compress.py --method numerical, and what opens its folder."""

    @pytest.fixture
    def job(self, tiny_folder, flat_images, tmp_path, capsys):
        def run(*flags, model=f"local-dir:{tiny_folder}", output="out"):
            capsys.readouterr()
            argv = ["--model", model, "--data-dir", flat_images, "--output", tmp_path / output, "--threads", "1"]
            status = common.run(compress_command, [str(a) for a in [*argv, "--nsamples", "16", *flags]])
            out, err = capsys.readouterr()
            return status, out, err

        return run

    def test_load_export_and_run(self, job, tmp_path, capsys):
        status, out, err = job("--method", "numerical", "--compression", "0.5")
        assert status == 0, err
        result = json.loads(out.splitlines()[-1])
        assert result["compression"] == pytest.approx(0.5, abs=4 * 16 * 48 / (3 * 12 * 48 * 48) / 2 + 1e-6)
        assert (result["heads_before"], result["neurons_before"]) == (9, 576)
        model = vitoats.load(tmp_path / "out")
        assert not re.search("Infinity|NaN", (tmp_path / "out/vitoats.json").read_text())  # JSON for any reader
        kept = kept_units(model)
        assert sum(n for name, n in kept.items() if name.endswith("attn")) == result["heads"]
        assert sum(n for name, n in kept.items() if name.endswith("mlp")) == result["neurons"]
        for i, block in enumerate(model.blocks):
            assert block.attn.qkv.weight.shape == (3 * 16 * kept[f"blocks.{i}.attn"], 48)
            assert block.mlp.fc2.weight.shape == (48, kept[f"blocks.{i}.mlp"])
            assert re.search(rf"blocks\.{i}\.attn +heads +3 +{kept[f'blocks.{i}.attn']} ", out)  # the table has the real shapes
            assert re.search(rf"blocks\.{i}\.mlp +neurons +192 +{kept[f'blocks.{i}.mlp']} ", out)
        assert len({tuple(b.mlp.fc1.weight.shape) for b in model.blocks}) > 1  # uneven
        assert result["param_count"] == round(sum(p.numel() for p in model.parameters()) / 1e6, 3)

        images = torch.randn(3, 3, 32, 32)
        argv = [str(tmp_path / "out"), "-o", str(tmp_path / "out.onnx"), "--quiet"]
        assert common.run(export_command, argv) == 0, capsys.readouterr().err
        opened = session(tmp_path / "out.onnx", 1)
        assert not opened.native_nodes
        got = opened.run(None, {"images": images.numpy()})[0]
        with torch.inference_mode():
            assert np.allclose(got, model(images), atol=1e-4)

    def test_the_folder_can_be_compressed_further(self, job, tmp_path):
        assert job("--method", "numerical", "--compression", "0.3")[0] == 0
        status, _, err = job("--method", "oats", "--iterations", "3", model=str(tmp_path / "out"), output="both")
        assert status == 0, err
        first, both = vitoats.load(tmp_path / "out"), vitoats.load(tmp_path / "both")
        assert kept_units(both) == kept_units(first)
        assert both.blocks[0].attn.qkv.S.shape == first.blocks[0].attn.qkv.weight.shape
        with torch.inference_mode():
            assert torch.isfinite(both(torch.randn(2, 3, 32, 32))).all()
        status, _, err = job("--method", "wanda", "--format", "dense", model=str(tmp_path / "out"), output="dense")
        assert (status, "leave --format out" in err) == (2, True)

    def test_a_folder_whose_shapes_were_changed_is_refused(self, job, tmp_path):
        assert job("--method", "numerical")[0] == 0
        file = tmp_path / "out/vitoats.json"
        about = json.loads(file.read_text())
        for wrong in ({"blocks.0.attn": 99}, {"blocks.9.attn": 1}, {"blocks.0": 1}, {}):
            file.write_text(json.dumps(about | {"kept_units": wrong}))
            with pytest.raises(InputError, match="compress again"):
                vitoats.load(tmp_path / "out")

    @pytest.mark.parametrize(
        ("flags", "said"),
        [
            ("--fused-qkv", "leave --fused-qkv out"),
            ("--format dense", "leave --format out"),
            ("--pattern row", "takes no --pattern"),
            ("--method-options cut=flat", "weighted or literal"),
            ("--compression 0.99", "lower --compression to 0.88"),
        ],
    )
    def test_what_it_does_not_take_is_refused(self, job, tmp_path, flags, said):
        status, out, err = job("--method", "numerical", "--quiet", *flags.split())
        assert (status, out) == (2, "")
        assert said in err
        assert len(err.splitlines()) == 1
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("int8", "options"), [(False, {"compensation": "dense"}), (True, {})])
def test_a_run_that_stops_anywhere_goes_on_and_gives_the_same(tmp_path, int8, options):
    images, config = torch.randn(8, 3, 32, 32), NumericalConfig(compression=0.4, **options)

    def pruned(store=None, stop_at=None):
        model, steps = create("vit_tiny_patch16_224", 32, patch_size=8), []

        def progress(done, _n, what):
            steps.append((done, what))
            if len(steps) == stop_at:
                raise KeyboardInterrupt

        job = job_of("numerical", config, int8=int8)
        prune(adapt(model, ImageInputs(32)), job, iter(images.split(3)), len(images), None, progress, store)
        return model.state_dict(), steps

    whole, steps = pruned()
    for stop_at in range(2, len(steps) + 1):
        with pytest.raises(KeyboardInterrupt):
            pruned(RunFolder(tmp_path / "kept", "k", resume=True), stop_at)
    found, again = pruned(RunFolder(tmp_path / "kept", "k", resume=True))
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], whole[name]) for name in whole)
    assert "pruning" not in dict(again).values()
