"""The two ways through a block: what is kept of them saves passes, and changes nothing."""

import pytest
import torch

from tests.calibration.states import collect, scaled
from tests.in_place import compress_in_place, job_of
from vitoats.calibration.paths import CompressedPath, DensePath
from vitoats.methods.oats_h import OATSHConfig
from vitoats.models.hooks import inputs_of

import timm  # isort: skip


def swin() -> torch.nn.Module:
    """Hidden states that change their shape, and tokens in windows."""
    arguments = {"embed_dim": 24, "depths": (1, 1), "num_heads": (2, 4), "window_size": 4}
    return timm.create_model("swin_tiny_patch4_window7_224", img_size=32, num_classes=4, **arguments).eval()


def parallel() -> torch.nn.Module:
    """Two attentions and two MLPs side by side in each block."""
    from timm.models.vision_transformer import ParallelThingsBlock, VisionTransformer

    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 4}
    return VisionTransformer(**arguments, block_fn=ParallelThingsBlock).eval()


@pytest.mark.parametrize("name", ["vit", "swin", "parallel"])
def test_what_is_kept_changes_nothing(monkeypatch, name):
    """With room for a block's inputs and outputs little runs twice; without, every pass starts anew. Bit for bit the same."""
    images = torch.randn(8, 3, 32, 32)
    found, passes = [], []
    for share in (0.5, 0.0):
        monkeypatch.setattr("vitoats.compression.plan.MEMORY_SHARE", share)
        torch.manual_seed(0)
        model = {"vit": scaled, "swin": swin, "parallel": parallel}[name]()
        counted = []
        for module in model.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.register_forward_hook(lambda *_, counted=counted: counted.append(1))
        compress_in_place(model, images, job_of("oats-h", OATSHConfig(compression=0.5), target="residual", refit_bias=True))
        found.append(model.state_dict())
        passes.append(len(counted))
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[1])
    assert passes[0] < passes[1]


@pytest.mark.parametrize("keep", [True, False])
def test_the_dense_path_does_not_see_what_becomes_of_the_model(tiny, keep):
    images = torch.randn(6, 3, 32, 32)
    adapter, hidden = collect(tiny, images)
    _, reference = collect(tiny, images)
    path = DensePath(hidden, keep)
    first = adapter.blocks[0]
    path.enter(first, first.linears, residual=True)
    with torch.inference_mode():
        expected = inputs_of({"attn.proj": first.module.attn.proj}, lambda: first.run(reference.batch(1)))
    reference.advance(first)
    for layer in first.linears:
        layer.module.weight.data.zero_()
    assert torch.equal(path.inputs(1, ["attn.proj"])["attn.proj"], expected["attn.proj"])
    path.advance(first)
    assert torch.equal(hidden.values, reference.values)


def test_finished_modules_are_replayed_and_others_run(tiny):
    """Once attention's layers are compressed, it answers with what it put out in the pass before."""
    adapter, hidden = collect(tiny, torch.randn(4, 3, 32, 32))
    block = adapter.blocks[0]
    qkv, proj, fc1, _ = block.linears
    path = CompressedPath(hidden, keep=True)
    path.enter(block, block.linears)
    path.finish(qkv)
    path.finish(proj)
    first = path.inputs(0, ["mlp.fc1"])["mlp.fc1"].clone()
    qkv.module.weight.data.zero_()  # which nobody does to a compressed layer; it shows what runs
    assert torch.equal(path.inputs(0, ["mlp.fc1"])["mlp.fc1"], first)
    path.finish(fc1)
    path.advance(block)
    assert "forward" not in vars(block.module.attn)
    with torch.inference_mode():
        assert not torch.equal(block.run(torch.ones(1, 17, 48)), torch.ones(1, 17, 48))
