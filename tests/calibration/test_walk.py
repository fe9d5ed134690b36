"""From block to block: what the caller makes of a block is what the images then go through."""

import torch

from tests.calibration.states import collect
from vitoats.calibration.walk import walk


def test_images_are_before_the_block_that_is_yielded(tiny):
    images = torch.randn(5, 3, 32, 32)
    adapter, hidden = collect(tiny, images)
    with torch.inference_mode():
        expected = adapter.first_hidden(images)
        for block in walk(adapter.blocks, hidden):
            assert torch.allclose(hidden.values, expected, atol=1e-5)
            block.module.mlp.fc1.weight.data *= 0.5
            expected = block.run(expected)


def test_behind_the_last_block_nothing_runs(tiny):
    adapter, hidden = collect(tiny, torch.randn(2, 3, 32, 32))
    *_, last = walk(adapter.blocks, hidden)
    before = hidden.values.clone()
    assert last is adapter.blocks[-1]
    assert torch.equal(hidden.values, before)
    hidden.advance(last)
    assert not torch.equal(hidden.values, before)
