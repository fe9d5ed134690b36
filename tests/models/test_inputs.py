"""What a model takes, and its features in two ways."""

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


VIT = {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 3}
MAX = {"img_size": 64, "depths": (1, 1), "embed_dim": (32, 64)}
MAPS = [
    ("swin_tiny_patch4_window7_224", SWIN | {"img_size": 32}, 48),  # height, width, channels
    ("convnext_tiny", {"depths": (1, 1, 1, 1), "dims": (16, 16, 32, 32)}, 32),  # channels first; a norm behind the pooling
    ("convnext_tiny", {"depths": (1, 1, 1, 1), "dims": (16, 16, 32, 2)}, 2),  # maps of 2 x 2 x 2
    ("davit_tiny", {"depths": (1, 1), "embed_dims": (24, 48), "num_heads": (2, 2)}, 48),
    ("maxvit_tiny_tf_224", MAX, 512),
]
TOKENS = [
    ("vit_tiny_patch16_224", VIT | {"patch_size": 8}, 96),  # class token, patches
    ("vit_base_patch16_siglip_gap_224", VIT, 48),  # patches alone
    ("deit_tiny_patch16_224", VIT | {"global_pool": "avg", "fc_norm": True}, 96),  # a norm that belongs to the head
    ("cait_xxs24_224", VIT, 96),  # blocks of another kind behind the last one
    ("samvit_base_patch16", VIT, 256),  # maps with the channels last in the blocks, and first behind them
]


def with_features(name: str, arguments: dict) -> tuple[torch.nn.Module, ImageInputs, torch.Tensor, torch.Tensor]:
    model = timm.create_model(name, num_classes=4, **arguments).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    inputs = ImageInputs(arguments.get("img_size", 64))
    images = inputs.noise(2)
    return model, inputs, images, inputs.features(model, images)


@pytest.mark.parametrize(("name", "arguments", "width"), [*MAPS, *TOKENS])
def test_features_from_images_and_from_the_last_hidden_states_are_the_same(name, arguments, width):
    model, inputs, images, features = with_features(name, arguments)
    assert features.shape == (2, width)
    adapter = adapt(model, inputs)
    with torch.inference_mode():
        hidden = adapter.first_hidden(images)
        for block in adapter.blocks:
            hidden = block.run(hidden)
    assert torch.allclose(adapter.features_of(hidden), features, atol=1e-5)
    assert torch.equal(inputs.features(model, images), features)  # the blocks run again


@pytest.mark.parametrize(("name", "arguments", "width"), MAPS)
def test_features_of_maps_are_the_input_of_the_classifier(name, arguments, width):
    model, _, images, features = with_features(name, arguments)
    classifier = model.get_classifier()
    assert torch.allclose(classifier(features), model(images), atol=1e-5)


def test_maps_that_a_head_does_not_pool_are_averaged_over_their_positions():
    model, _, images, features = with_features("samvit_base_patch16", {**VIT, "global_pool": ""})
    assert torch.allclose(features, model.forward_features(images).mean(dim=(2, 3)), atol=1e-6)
