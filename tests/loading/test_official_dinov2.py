"""Official DINOv2 files, rebuilt from timm models key by key as Meta's files have them: outputs are compared."""

import pytest
import torch

from tests.loading.files import outputs, refusal, write_checkpoint
from vitoats.loading.load import load_model

import timm  # isort: skip
from timm.models import save_for_hf  # isort: skip


def official(model, registers=False, swiglu=False):
    """A timm DINOv2 model's weights as Meta's files name them."""
    state = {k: v.clone() for k, v in model.state_dict().items()}
    width = model.embed_dim
    if registers:  # timm adds the class token's own position to the class token; Meta keeps it in pos_embed
        own = 0.1 * torch.randn(1, 1, width)
        state["register_tokens"] = state.pop("reg_token")
        state["cls_token"] = state["cls_token"] - own
        state["pos_embed"] = torch.cat([own, state["pos_embed"]], dim=1)
    if swiglu:
        renamed = {"mlp.fc1": "mlp.w12", "mlp.fc2": "mlp.w3"}
        for ours, theirs in renamed.items():
            state = {k.replace(ours, theirs): v for k, v in state.items()}
    assert state["pos_embed"].shape == (1, 1 + 37 * 37, width)
    return state | {"mask_token": torch.zeros(1, width)}


def randomised(model):
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    return model.eval()


@pytest.mark.parametrize(
    ("name", "architecture"),
    [("dinov2_vits14", "vit_small_patch14_dinov2"), ("dinov2_vits14_reg", "vit_small_patch14_reg4_dinov2")],
)
def test_official_files_give_the_models_outputs(tmp_path, name, architecture):
    registers = name.endswith("_reg")
    model = randomised(timm.create_model(architecture, num_classes=0))  # 518 px, as it was trained
    path = write_checkpoint(official(model, registers), tmp_path / f"{name}_pretrain.pth")

    full = load_model(name, checkpoint=path, img_size=518)
    torch.testing.assert_close(outputs(full.model, 518), outputs(model, 518), rtol=1e-4, atol=1e-4)

    usual = load_model(name, checkpoint=path, pos_resample="timm")  # 224 px
    assert (usual.preprocessing.img_size, usual.preprocessing.crop_pct) == (224, 224 / 256)
    assert usual.preprocessing.interpolation == "bicubic"
    model.set_input_size((224, 224))
    torch.testing.assert_close(outputs(usual.model, 224), outputs(model, 224), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("registers", [False, True])
def test_official_files_of_the_giant_architecture(tmp_path, registers):
    """w12 and w3 of its SwiGLU; a narrow model of that architecture stands for the 4.5 GB one."""
    architecture = "vit_giant_patch14_reg4_dinov2" if registers else "vit_giant_patch14_dinov2"
    model = randomised(timm.create_model(architecture, num_classes=0, embed_dim=48, depth=2, num_heads=3))
    save_for_hf(timm.create_model(architecture, num_classes=0, embed_dim=48, depth=2, num_heads=3), str(tmp_path / "narrow"))
    path = write_checkpoint(official(model, registers, swiglu=True), tmp_path / "official.pth")
    loaded = load_model(f"local-dir:{tmp_path / 'narrow'}", checkpoint=path)
    torch.testing.assert_close(outputs(loaded.model, 518), outputs(model, 518), rtol=1e-4, atol=1e-4)


def test_an_official_file_under_another_name_is_refused(tmp_path):
    model = timm.create_model("vit_small_patch14_reg4_dinov2", num_classes=0)
    path = write_checkpoint(official(model, registers=True), tmp_path / "reg.pth")
    for name in ("dinov2_vits14", "dinov2_vitb14_reg"):
        message = refusal(name, checkpoint=path)
        assert str(path) in message
        assert f"do not fit {name}" in message
