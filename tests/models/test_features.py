"""Tokens as outputs are those that timm's own functions give."""

import pytest
import torch

import vitoats.common.torchvision_ops  # noqa: F401  (before timm)
from vitoats.common.errors import InputError
from vitoats.models.features import FeatureOutputs

import timm  # isort: skip

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 4}
SWIN = {"img_size": 32, "embed_dim": 24, "depths": (1, 1, 1), "num_heads": (1, 2, 4), "window_size": 2, "num_classes": 4}
X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", reg_tokens=2, **SMALL).eval()


@torch.inference_mode()
def test_tokens_of_the_last_block(vit):
    tokens = vit.forward_features(X)
    outputs = FeatureOutputs(vit, "all")
    assert outputs.names == ("cls", "registers", "patches")
    for found, expected in zip(outputs(X), (tokens[:, 0], tokens[:, 1:3], tokens[:, 3:]), strict=True):
        assert torch.allclose(found, expected, atol=1e-6)
    for kind, expected in {"cls": tokens[:, 0], "patches": tokens[:, 3:]}.items():
        (found,) = FeatureOutputs(vit, kind)(X)
        assert torch.allclose(found, expected, atol=1e-6)


@torch.inference_mode()
@pytest.mark.parametrize(("kind", "n", "indices"), [("layers=2", 2, (2, 3)), ("layers=0,2", [0, 2], (0, 2))])
def test_tokens_of_several_blocks(vit, kind, n, indices):
    outputs = FeatureOutputs(vit, kind)
    assert outputs.names == tuple(f"{part}_{i}" for i in indices for part in ("cls", "patches"))
    found = outputs(X)
    for i, (patches, prefix) in enumerate(vit.get_intermediate_layers(X, n=n, return_prefix_tokens=True, norm=True)):
        assert torch.allclose(found[2 * i], prefix[:, 0], atol=1e-6)
        assert torch.allclose(found[2 * i + 1], patches, atol=1e-6)


@torch.inference_mode()
def test_positions_of_feature_maps():
    model = timm.create_model("swin_tiny_patch4_window7_224", **SWIN).eval()
    outputs = FeatureOutputs(model, "all")
    assert outputs.names == ("patches",)
    assert torch.allclose(outputs(X)[0], model.forward_features(X).flatten(1, 2), atol=1e-6)
    with pytest.raises(InputError, match="no class token"):
        FeatureOutputs(model, "cls")


@pytest.mark.parametrize("kind", ["logits", "layers=", "layers=9", "layers=4,5", "layers=a", "layers=-1,2"])
def test_other_features_are_refused(vit, kind):
    with pytest.raises(InputError, match="`features`"):
        FeatureOutputs(vit, kind)
