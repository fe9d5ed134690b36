"""Tables of the model names that vitoats defines: hub-style DINOv2 names and the embedded default."""

from dataclasses import dataclass


@dataclass(frozen=True)
class NamedModel:
    """A row of the table: the timm model that a name stands for, the file with its weights, and its usual preprocessing."""

    timm_name: str
    weights_file: str
    img_size: int
    crop_pct: float


def _dinov2(timm_name: str, weights_file: str) -> NamedModel:
    # DINOv2's linear evaluation: resize the short side to 256 (bicubic), crop 224
    return NamedModel(f"{timm_name}.lvd142m", weights_file, img_size=224, crop_pct=224 / 256)


DINOV2 = {
    "dinov2_vits14": _dinov2("vit_small_patch14_dinov2", "dinov2_vits14_pretrain.pth"),
    "dinov2_vitb14": _dinov2("vit_base_patch14_dinov2", "dinov2_vitb14_pretrain.pth"),
    "dinov2_vitl14": _dinov2("vit_large_patch14_dinov2", "dinov2_vitl14_pretrain.pth"),
    "dinov2_vitg14": _dinov2("vit_giant_patch14_dinov2", "dinov2_vitg14_pretrain.pth"),
    "dinov2_vits14_reg": _dinov2("vit_small_patch14_reg4_dinov2", "dinov2_vits14_reg4_pretrain.pth"),
    "dinov2_vitb14_reg": _dinov2("vit_base_patch14_reg4_dinov2", "dinov2_vitb14_reg4_pretrain.pth"),
    "dinov2_vitl14_reg": _dinov2("vit_large_patch14_reg4_dinov2", "dinov2_vitl14_reg4_pretrain.pth"),
    "dinov2_vitg14_reg": _dinov2("vit_giant_patch14_reg4_dinov2", "dinov2_vitg14_reg4_pretrain.pth"),
}

ON_HUB = " on the Hugging Face Hub"  # suffix of ``LoadedModel.weights`` for weights from the Hub

EMBEDDED = "dinov2s_derived"
EMBEDDED_DEPTH = 10  # of 12 blocks: the last two were fine-tuned for another task, and features are better without them
EMBEDDED_IMG_SIZE = 98
