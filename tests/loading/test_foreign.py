"""Proves that models which transformers, open_clip and torchvision saved give the same outputs here."""

import json
import logging

import pytest
import torch

import vitoats.common.torchvision_ops  # noqa: F401  (before timm and transformers)
from vitoats.common.errors import InputError
from vitoats.loading.load import load_model

import timm  # isort: skip
import transformers  # isort: skip

SMALL = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 32, "patch_size": 8}
MLP = SMALL | {"intermediate_size": 96}


@pytest.fixture(autouse=True)
def _log(caplog):
    caplog.set_level(logging.INFO, "vitoats")


def saved(kind, config, path, **settings):
    """A model of transformers with random weights far from zero, and its folder."""
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, config)(**settings)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_((0.3 if "embed" in name or "token" in name else 0.1) * torch.randn_like(parameter))
    model.save_pretrained(path)
    return model


def cls(out):
    return out.last_hidden_state[:, 0]


CLIP = {"vision_config": MLP, "projection_dim": 16, "text_config": {"hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 10,
        "num_attention_heads": 2, "intermediate_size": 16, "bos_token_id": 0, "eos_token_id": 1}}  # fmt: skip
KINDS = {
    "vit classifier": ("ViTForImageClassification", "ViTConfig", MLP | {"num_labels": 5, "layer_norm_eps": 1e-6}, "logits"),
    "vit features": ("ViTModel", "ViTConfig", MLP | {"layer_norm_eps": 1e-6}, cls),
    "deit": ("DeiTForImageClassificationWithTeacher", "DeiTConfig", MLP | {"num_labels": 5, "layer_norm_eps": 1e-6}, "logits"),
    "dinov2 classifier": ("Dinov2ForImageClassification", "Dinov2Config", SMALL | {"num_labels": 5}, "logits"),
    "dinov2 swiglu": ("Dinov2Model", "Dinov2Config", SMALL | {"use_swiglu_ffn": True}, cls),
    "dinov2 registers": (
        "Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig",
        SMALL | {"num_labels": 5, "num_register_tokens": 3}, "logits",
    ),
    "dinov3": ("DINOv3ViTModel", "DINOv3ViTConfig", MLP | {"num_register_tokens": 4}, cls),
    "dinov3 gated": ("DINOv3ViTModel", "DINOv3ViTConfig", MLP | {"use_gated_mlp": True, "hidden_act": "silu"}, cls),
    "clip tower": ("CLIPVisionModelWithProjection", "CLIPVisionConfig", MLP | {"projection_dim": 16}, "image_embeds"),
    "clip": ("CLIPModel", "CLIPConfig", CLIP, lambda model, x: model.get_image_features(x)),
    "siglip tower": ("SiglipVisionModel", "SiglipVisionConfig", MLP, "pooler_output"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # of transformers, about its configurations
@pytest.mark.parametrize("kind", KINDS)
def test_a_transformers_folder_gives_its_outputs(tmp_path, kind, caplog):
    name, config, settings, output = KINDS[kind]
    model = saved(name, config, tmp_path, **settings)
    loaded = load_model(f"local-dir:{tmp_path}")
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        if kind == "clip":
            expected = output(model, images)
            expected = getattr(expected, "pooler_output", expected)
        else:
            out = model(pixel_values=images)
            expected = output(out) if callable(output) else getattr(out, output)
        torch.testing.assert_close(loaded.model(images), expected, rtol=1e-3, atol=1e-4)
    assert "converted from transformers" in caplog.text
    assert loaded.preprocessing.img_size == 32


def test_the_preprocessor_decides_the_images(tmp_path):
    saved("Dinov2Model", "Dinov2Config", tmp_path, **SMALL)
    said = {"do_center_crop": True, "crop_size": {"height": 24, "width": 24}, "size": {"shortest_edge": 28}, "resample": 2,
            "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}  # fmt: skip
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    loaded = load_model(f"local-dir:{tmp_path}")
    images = loaded.preprocessing
    assert (images.img_size, images.crop_pct, images.interpolation) == (24, 24 / 28, "bilinear")
    assert (images.mean, images.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert "positions resized as in hf" in loaded.weights


def test_weights_of_transformers_fit_a_name_of_timm(tmp_path):
    sizes = {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 12, "num_attention_heads": 3}
    model = saved("ViTForImageClassification", "ViTConfig", tmp_path, **sizes, image_size=32, num_labels=3)
    loaded = load_model("vit_tiny_patch16_224", checkpoint=tmp_path / "model.safetensors")
    images = torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(loaded.model(images), model(images).logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        ({"model_type": "swin"}, "of the type 'swin'"),
        ({"model_type": ["vit"]}, "of the type"),
        ({"hidden_size": 10**9}, "hidden_size is out of range"),
        ({"num_hidden_layers": "12"}, "num_hidden_layers is no whole number"),
        ({"hidden_act": "os.system"}, "cannot be converted"),
        ({"image_size": 10**6}, "px"),
        ({"num_channels": 1}, "channels"),
        ({"hidden_size": 48 * 128, "num_hidden_layers": 400}, "far larger than the file"),
    ],
)
def test_configurations_that_cannot_be_converted_are_named(tmp_path, edit, said):
    saved("ViTModel", "ViTConfig", tmp_path, **MLP)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | edit))
    with pytest.raises(InputError) as error:
        load_model(f"local-dir:{tmp_path}")
    assert said in str(error.value)
    assert len(str(error.value)) < 500


def open_clip(state):
    """A timm tower's weights in open_clip's own names."""
    renamed = {
        "patch_embed.proj": "conv1", "norm_pre": "ln_pre", "norm1": "ln_1", "norm2": "ln_2", "attn.qkv.": "attn.in_proj_",
        "attn.proj": "attn.out_proj", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj", "blocks.": "transformer.resblocks.",
    }  # fmt: skip
    own = {"class_embedding": state["cls_token"][0, 0], "positional_embedding": state["pos_embed"][0]}
    own["proj"] = state["head.weight"].T
    for name, tensor in state.items():
        if name in ("cls_token", "pos_embed") or name.startswith("head."):
            continue
        for ours, theirs in renamed.items():
            name = name.replace(ours, theirs)
        own["ln_post" + name[4:] if name.startswith("norm.") else name] = tensor
    return own


@pytest.mark.parametrize("prefix", ["", "visual.", "module.visual.", "model.visual."])
def test_open_clips_own_towers(tmp_path, caplog, prefix):
    torch.manual_seed(0)
    small = {"depth": 2, "embed_dim": 48, "num_heads": 3}
    model = timm.create_model("vit_base_patch32_clip_224", num_classes=24, **small).eval()
    torch.nn.init.normal_(model.head.weight)
    state = {prefix + name: tensor.contiguous() for name, tensor in open_clip(model.state_dict()).items()}
    text = {"token_embedding.weight": torch.zeros(4, 8), "logit_scale": torch.tensor(4.6)} if prefix else {}
    torch.save({"epoch": 3, "state_dict": state | text}, tmp_path / "w.pt")
    loaded = load_model("vit_base_patch32_clip_224", checkpoint=tmp_path / "w.pt", model_kwargs=small)
    images = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        torch.testing.assert_close(loaded.model(images), model(images), rtol=1e-4, atol=1e-4)
    assert "converted from open_clip" in caplog.text


@pytest.mark.parametrize("prefix", ["", "module."])
def test_torchvisions_vit(tmp_path, caplog, prefix):
    from torchvision.models import VisionTransformer

    torch.manual_seed(0)
    model = VisionTransformer(32, 8, num_layers=2, num_heads=3, hidden_dim=48, mlp_dim=192, num_classes=5).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    torch.save(
        {"model": {prefix + name: tensor for name, tensor in model.state_dict().items()}, "epoch": 1}, tmp_path / "w.pth"
    )
    small = {"patch_size": 8, "depth": 2, "embed_dim": 48, "num_heads": 3}
    loaded = load_model("vit_base_patch16_224", checkpoint=tmp_path / "w.pth", img_size=32, model_kwargs=small)
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(loaded.model(images), model(images), rtol=1e-4, atol=1e-4)
    assert "converted from torchvision" in caplog.text


def test_a_timm_tower_of_open_clip(tmp_path, tiny_folder, tiny, caplog):
    state = {f"module.visual.trunk.{name}": tensor for name, tensor in tiny.state_dict().items()}
    torch.save({"state_dict": state | {"module.visual.head.proj.weight": torch.zeros(512, 48)}}, tmp_path / "w.pt")
    loaded = load_model(f"local-dir:{tiny_folder}", checkpoint=tmp_path / "w.pt")
    assert torch.equal(loaded.model.state_dict()["norm.weight"], tiny.norm.weight)
    assert "leave out visual.head.proj.weight" in caplog.text


def test_a_folder_of_open_clip_is_named(tmp_path):
    (tmp_path / "open_clip_config.json").write_text("{}")
    with pytest.raises(InputError, match=r"open_clip.*`checkpoint`"):
        load_model(f"local-dir:{tmp_path}")
