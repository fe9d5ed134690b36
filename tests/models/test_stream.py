"""Which layers add to the residual stream is found by structure, with the scale of what they add."""

import torch

from tests.calibration.states import scaled
from vitoats.models.adapter import adapt
from vitoats.models.inputs import ImageInputs
from vitoats.models.stream import stream_additions

import timm  # isort: skip


def hidden_before(model, images):
    adapter = adapt(model, ImageInputs(32))
    return adapter, adapter.first_hidden(images)


def test_what_adds_to_the_residual_stream_is_found_with_its_scale():
    model = scaled()
    adapter, hidden = hidden_before(model, torch.randn(2, 3, 32, 32))
    found = stream_additions(adapter.blocks[0], adapter.blocks[0].linears, hidden)
    assert set(found) == {"blocks.0.attn.proj", "blocks.0.mlp.fc2"}
    assert found["blocks.0.attn.proj"].stream in ("", "norm1")  # the block's input is that of its first norm
    assert found["blocks.0.mlp.fc2"].stream == "norm2"
    assert torch.allclose(found["blocks.0.attn.proj"].gamma, model.blocks[0].ls1.gamma, atol=1e-6)
    assert torch.allclose(found["blocks.0.mlp.fc2"].gamma, model.blocks[0].ls2.gamma, atol=1e-6)


def test_without_layer_scale_the_scale_is_one(tiny):
    adapter, hidden = hidden_before(tiny, torch.randn(2, 3, 32, 32))
    found = stream_additions(adapter.blocks[1], adapter.blocks[1].linears, hidden)
    assert torch.allclose(found["blocks.1.mlp.fc2"].gamma, torch.ones(48), atol=1e-6)


def test_a_block_that_normalises_after_adding_has_no_such_layers():
    torch.manual_seed(0)
    model = timm.create_model("vit_relpos_small_patch16_rpn_224", img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3)
    model.eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    adapter, hidden = hidden_before(model, torch.randn(2, 3, 32, 32))
    assert stream_additions(adapter.blocks[0], adapter.blocks[0].linears, hidden) == {}
