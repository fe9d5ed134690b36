"""timm architectures at tiny sizes, from compression to ONNX Runtime; what does not fit is refused with the reason."""

import numpy as np
import pytest
import torch

import vitoats
import vitoats.common.torchvision_ops
from tests.in_place import compress_in_place, job_of
from vitoats.common.errors import InputError
from vitoats.data.transforms import Preprocessing
from vitoats.export.onnx_file import export_onnx
from vitoats.format.layers import compressed_layers
from vitoats.loading.checkpoint import load_checkpoint, save_checkpoint
from vitoats.loading.loaded import LoadedModel
from vitoats.methods.oats import OATSConfig
from vitoats.runtime import session

import timm  # isort: skip

VIT = {"embed_dim": 48, "depth": 2, "num_heads": 3}
ROTARY = {**VIT, "num_heads": 2}  # a head's width is a multiple of 4
ONE = {"depth": 1}  # tracing takes the time, and FAST shows what passes from block to block
STAGES = {"embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4)}

# (timm name, arguments, linear layers that are compressed)
FAST = [
    # DeiT-3: layer scale
    ("deit3_small_patch16_224", {"img_size": 32, **VIT}, 8),
    # image towers of CLIP and SigLIP: a norm before the blocks; attention pooling
    ("vit_base_patch32_clip_224", {"img_size": 64, **VIT}, 8),
    ("vit_base_patch16_siglip_224", {"img_size": 32, **VIT}, 8),
    # EVA-02: rotary embedding, SwiGLU in three matrices, and q, k and v as well
    ("eva02_base_patch14_224", {"img_size": 28, **ROTARY}, 14),
    # BEiT: biases of q and v apart, relative positions in each block
    ("beit_base_patch16_224", {"img_size": 32, **VIT}, 8),
    # stages: windows, and modules between that make hidden states smaller and wider
    ("swin_tiny_patch4_window7_224", {"img_size": 32, "window_size": 4, **STAGES, "depths": (2, 1)}, 13),
    ("swinv2_tiny_window8_256", {"img_size": 32, "window_size": 4, **STAGES, "depths": (1, 1)}, 9),
    # stages: blocks whose outputs have another shape than their inputs
    ("hiera_tiny_224", {"img_size": 32, "embed_dim": 24, "num_heads": 1, "stages": (1, 1), "q_pool": 1}, 9),
]
SLOW = [
    ("deit_tiny_distilled_patch16_224", {"img_size": 32, **VIT, **ONE}, 4),
    ("vit_giant_patch14_reg4_dinov2", {"img_size": 28, **VIT, **ONE}, 4),
    ("eva_giant_patch14_224", {"img_size": 28, **VIT, **ONE}, 4),
    ("vit_base_patch16_224", {"img_size": 32, **VIT, **ONE}, 4),
    ("deit_tiny_patch16_224", {"img_size": 32, **VIT, **ONE}, 4),
    ("vit_small_patch14_dinov2", {"img_size": 28, **VIT, **ONE}, 4),
    ("vit_small_patch14_reg4_dinov2", {"img_size": 28, **VIT, **ONE}, 4),
    ("vit_small_patch16_dinov3", {"img_size": 32, **ROTARY, **ONE}, 4),
    ("vit_base_patch16_siglip_gap_224", {"img_size": 32, **VIT, **ONE}, 4),
    ("vit_pe_core_tiny_patch16_384", {"img_size": 32, **ROTARY, **ONE}, 4),
    ("vit_so150m_patch16_reg4_gap_256", {"img_size": 32, **VIT, **ONE}, 4),
    ("vit_small_patch16_18x2_224", {"img_size": 32, **VIT, **ONE}, 8),
    ("vit_relpos_small_patch16_224", {"img_size": 32, **VIT, **ONE}, 4),
    ("vit_base_patch16_rope_reg1_gap_256", {"img_size": 32, **ROTARY, **ONE}, 4),
    ("samvit_base_patch16_224", {"img_size": 32, **VIT, **ONE}, 4),
    ("flexivit_small", {"img_size": 32, **VIT, **ONE}, 4),
    ("aimv2_large_patch14_224", {"img_size": 28, **VIT, **ONE}, 5),
    ("eva02_tiny_patch14_224", {"img_size": 28, **ROTARY, **ONE}, 4),
    ("eva02_base_patch16_clip_224", {"img_size": 32, **ROTARY, **ONE}, 7),
    ("beitv2_base_patch16_224", {"img_size": 32, **VIT, **ONE}, 4),
    ("cait_xxs24_224", {"img_size": 32, **VIT, **ONE}, 6),
    ("xcit_nano_12_p16_224", {"img_size": 32, **VIT, **ONE}, 4),
    ("swinv2_cr_tiny_224", {"img_size": 64, "window_size": 4, **STAGES}, 17),
    ("mixer_s32_224", {"img_size": 64}, 32),
    ("davit_tiny", {"depths": (1, 1), "embed_dims": (24, 48), "num_heads": (2, 2)}, 16),
    ("convnext_tiny", {"depths": (1, 1, 1, 1), "dims": (16, 16, 32, 32)}, 8),
    ("levit_128s", {"img_size": 224}, None),
]


def tiny_architecture(name: str, arguments: dict) -> LoadedModel:
    """Random weights, all different from their usual first values, so that each layer and bias counts."""
    model = timm.create_model(name, num_classes=5, **arguments).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    size = arguments.get("img_size", 64)
    return LoadedModel(name, model, Preprocessing(img_size=size, crop_pct=1.0), "random weights")


@pytest.mark.parametrize(
    ("name", "arguments", "n_layers"),
    [*FAST, *(pytest.param(*row, marks=pytest.mark.slow) for row in SLOW)],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_from_compression_to_onnx_runtime(name, arguments, n_layers, tmp_path):
    loaded = tiny_architecture(name, arguments)
    size = loaded.preprocessing.img_size
    images = torch.randn(5, 3, size, size)
    dense = loaded.model(images)
    report = compress_in_place(loaded.model, images, job_of("oats", OATSConfig(iterations=2), batch_size=2))
    assert n_layers in (None, len(report.layers))
    layers = compressed_layers(loaded.model)
    assert {row.name for row in report.layers} == set(layers)
    expected = loaded.model(images)
    assert (expected - dense).abs().max() > 1e-3 * dense.abs().max()

    save_checkpoint(loaded, tmp_path / "factored", report.to_dict())
    again = load_checkpoint(tmp_path / "factored")
    assert torch.equal(again.model(images), expected)

    export_onnx(again, tmp_path / "model.onnx")
    opened = session(tmp_path / "model.onnx")
    assert set(opened.native_nodes) == set(layers)
    for batch in (1, 5):
        found = opened.run(None, {"images": images[:batch].numpy()})[0]
        assert np.abs(found - expected[:batch].numpy()).max() < 1e-4 * expected.abs().max()

    save_checkpoint(loaded, tmp_path / "dense", report.to_dict(), dense=True)
    stock = timm.create_model(f"local-dir:{tmp_path / 'dense'}", pretrained=True).eval()
    assert torch.allclose(stock(images), expected, atol=1e-4 * float(expected.abs().max()))


# (timm name, arguments, image size): chains with links that hold no linear layers, inputs that hardly vary, maps, other tokens
DEFAULT_FAST = [
    ("convnext_tiny", {"depths": (1, 1, 1, 1), "dims": (16, 16, 32, 32)}, 64),
    ("hiera_tiny_224", {"img_size": 32, "embed_dim": 24, "num_heads": 1, "stages": (1, 1), "q_pool": 1}, 32),
]
DEFAULT_SLOW = [
    ("vit_small_patch16_dinov3", {"img_size": 32, **ROTARY}, 32),
    ("cait_xxs24_224", {"depth": 1}, 224),  # attention over 196 tokens is all but uniform
    ("davit_tiny", {"depths": (1, 1), "embed_dims": (24, 48), "num_heads": (2, 2)}, 64),
    ("sequencer2d_s", {"layers": (1, 1, 1, 1), "embed_dims": (24, 48, 48, 48), "hidden_sizes": (6, 12, 12, 12)}, 224),
    ("nextvit_small", {}, 64),
    ("edgenext_xx_small", {"dims": (16, 32, 32, 32), "depths": (1, 1, 2, 1)}, 64),
    ("efficientformer_l1", {"depths": (1, 1, 1, 2), "embed_dims": (16, 16, 32, 32)}, 224),
    ("swiftformer_xs", {"layers": (1, 1, 1, 1), "embed_dims": (16, 16, 32, 32)}, 224),
    ("mambaout_femto", {"depths": (1, 1, 1, 1), "dims": (16, 16, 32, 32)}, 64),
    ("maxvit_tiny_tf_224", {"img_size": 64, "depths": (1, 1), "embed_dim": (32, 64)}, 64),
    ("vit_small_r26_s32_224", {"img_size": 64, **VIT}, 64),  # a ResNet in front, whose blocks hold no linear layers
    ("xcit_nano_12_p16_224", {"img_size": 32, **VIT}, 32),
    ("naflexvit_base_patch16_gap", VIT, 32),
    ("eva02_base_patch14_224", {"img_size": 28, **ROTARY}, 28),
    ("beit_base_patch16_224", {"img_size": 32, **VIT}, 32),
    ("samvit_base_patch16_224", {"img_size": 32, **VIT}, 32),
    ("swinv2_cr_tiny_224", {"img_size": 64, "window_size": 4, **STAGES}, 64),
]


@pytest.mark.parametrize(
    ("name", "arguments", "size"),
    [*DEFAULT_FAST, *(pytest.param(*row, marks=pytest.mark.slow) for row in DEFAULT_SLOW)],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_the_default_method_with_its_own_recipe(name, arguments, size):
    """Measured budgets, the residual target and all, with first weights as timm makes them; and its outlook."""
    model = timm.create_model(name, num_classes=5, **arguments).eval()
    found = vitoats.compress(model, torch.randn(12, 3, size, size), nsamples=12, img_size=size, batch_size=4)
    assert found.about["recipe"]["allocation"] == "sensitivity"
    assert 0 <= max(found.about["feature_error"].values()) < 1.5
    assert set(compressed_layers(found.model)) == {row.name for row in found.report.layers}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size"), [("coat_tiny", 224), ("coat_lite_tiny", 224), ("crossvit_tiny_240", 240), ("volo_d1_224", 224)]
)
def test_what_does_not_fit_is_refused_by_the_default_method_too(name, size):
    with pytest.raises(InputError, match=r"docs/models\.md"):
        vitoats.compress(timm.create_model(name).eval(), torch.randn(12, 3, size, size), nsamples=12, img_size=size)
