"""What a model takes, and its features by two ways."""

import pytest
import torch

from vitoats.models.adapter import adapt
from vitoats.models.inputs import ImageInputs

import timm  # isort: skip

SWIN = {"embed_dim": 24, "depths": (1, 1), "num_heads": (2, 4), "window_size": 4}


def test_noise_is_the_same_for_a_seed():
    inputs = ImageInputs(16)
    assert inputs.noise(3).shape == inputs.zeros(3).shape == inputs.shape(3) == (3, 3, 16, 16)
    assert torch.equal(inputs.noise(3, seed=5), inputs.noise(3, seed=5))
    assert not torch.equal(inputs.noise(3, seed=5), inputs.noise(3))
    assert inputs.to_dict() == {"img_size": 16}


@pytest.mark.parametrize(
    ("name", "arguments", "width"),
    [
        ("vit_tiny_patch16_224", {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}, 96),  # class token, patches
        ("vit_base_patch16_siglip_gap_224", {"embed_dim": 48, "depth": 2, "num_heads": 3}, 48),  # patches alone
        ("swin_tiny_patch4_window7_224", SWIN, 48),  # maps
    ],
)
def test_features_from_images_and_from_the_last_hidden_states_are_the_same(name, arguments, width):
    inputs = ImageInputs(32)
    model = timm.create_model(name, img_size=32, num_classes=4, **arguments).eval()
    images = inputs.noise(2)
    adapter = adapt(model, inputs)
    with torch.inference_mode():
        features = inputs.features(model, images)
        hidden = adapter.first_hidden(images)
        for block in adapter.blocks:
            hidden = block.run(hidden)
        assert torch.allclose(inputs.features_of(model, hidden), features, atol=1e-5)
    assert features.shape == (2, width)
