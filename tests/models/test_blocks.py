"""Blocks and layers give their modules as they are now."""

import pytest
import torch

from vitoats.format.layers import SparseLowRankLinear, replace_module
from vitoats.models.adapter import adapt
from vitoats.models.inputs import ImageInputs


def test_a_layer_that_was_replaced_shows_in_its_block(tiny):
    block = adapt(tiny, ImageInputs(32)).blocks[1]
    layer = block.linears[0]
    assert layer.module is tiny.blocks[1].attn.qkv
    assert block.name_inside(layer) == "attn.qkv"
    compressed = SparseLowRankLinear(torch.zeros(144, 48), [torch.zeros(144, 0)], [torch.zeros(0, 48)], torch.zeros(144))
    replace_module(tiny, layer.name, compressed)
    assert block.module.attn.qkv is compressed
    with pytest.raises(AssertionError):
        layer.module  # noqa: B018


def test_another_module_runs_in_a_blocks_place_as_the_block_would(tiny):
    adapter = adapt(tiny, ImageInputs(32))
    hidden = adapter.first_hidden(torch.randn(2, 3, 32, 32))
    with torch.inference_mode():
        assert torch.equal(adapter.blocks[0].run(hidden, tiny.blocks[1]), tiny.blocks[1](hidden))


def test_the_blocks_do_not_run_for_the_first_hidden_states(tiny):
    adapter = adapt(tiny, ImageInputs(32))
    ran = []
    tiny.blocks[0].register_forward_hook(lambda *_: ran.append(1))
    images = torch.randn(2, 3, 32, 32)
    hidden = adapter.first_hidden(images)
    assert torch.equal(hidden, tiny._pos_embed(tiny.patch_embed(images)))
    assert not ran
