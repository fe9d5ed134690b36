"""Tables of the model names that vitoats defines: hub-style names of DINOv2 and DINOv3, and the embedded default."""

from dataclasses import dataclass


@dataclass(frozen=True)
class NamedModel:
    """A row of the table: the timm model that a name stands for, the file with its weights, and its usual preprocessing."""

    timm_name: str
    weights_file: str
    img_size: int
    crop_pct: float
    pos_resample: str


def _dinov2(timm_name: str, weights_file: str) -> NamedModel:
    # DINOv2's linear evaluation: resize the short side to 256 (bicubic), crop 224
    return NamedModel(f"{timm_name}.lvd142m", weights_file, img_size=224, crop_pct=224 / 256, pos_resample="official")


def _dinov3(timm_name: str, weights_file: str) -> NamedModel:
    # 256 px, whole; positions are rotary, so that nothing is resized
    return NamedModel(f"{timm_name}.lvd1689m", weights_file, img_size=256, crop_pct=1.0, pos_resample="timm")


HUB_NAMES = {
    "dinov2_vits14": _dinov2("vit_small_patch14_dinov2", "dinov2_vits14_pretrain.pth"),
    "dinov2_vitb14": _dinov2("vit_base_patch14_dinov2", "dinov2_vitb14_pretrain.pth"),
    "dinov2_vitl14": _dinov2("vit_large_patch14_dinov2", "dinov2_vitl14_pretrain.pth"),
    "dinov2_vitg14": _dinov2("vit_giant_patch14_dinov2", "dinov2_vitg14_pretrain.pth"),
    "dinov2_vits14_reg": _dinov2("vit_small_patch14_reg4_dinov2", "dinov2_vits14_reg4_pretrain.pth"),
    "dinov2_vitb14_reg": _dinov2("vit_base_patch14_reg4_dinov2", "dinov2_vitb14_reg4_pretrain.pth"),
    "dinov2_vitl14_reg": _dinov2("vit_large_patch14_reg4_dinov2", "dinov2_vitl14_reg4_pretrain.pth"),
    "dinov2_vitg14_reg": _dinov2("vit_giant_patch14_reg4_dinov2", "dinov2_vitg14_reg4_pretrain.pth"),
    # timm has most of them with and without biases of q and v: with them, every file fits; Meta's file names end in a digest
    "dinov3_vits16": _dinov3("vit_small_patch16_dinov3_qkvb", "dinov3_vits16_pretrain_lvd1689m-*.pth"),
    "dinov3_vits16plus": _dinov3("vit_small_plus_patch16_dinov3_qkvb", "dinov3_vits16plus_pretrain_lvd1689m-*.pth"),
    "dinov3_vitb16": _dinov3("vit_base_patch16_dinov3_qkvb", "dinov3_vitb16_pretrain_lvd1689m-*.pth"),
    "dinov3_vitl16": _dinov3("vit_large_patch16_dinov3_qkvb", "dinov3_vitl16_pretrain_lvd1689m-*.pth"),
    "dinov3_vith16plus": _dinov3("vit_huge_plus_patch16_dinov3_qkvb", "dinov3_vith16plus_pretrain_lvd1689m-*.pth"),
    "dinov3_vit7b16": _dinov3("vit_7b_patch16_dinov3", "dinov3_vit7b16_pretrain_lvd1689m-*.pth"),
}

ON_HUB = " on the Hugging Face Hub"  # suffix of ``LoadedModel.weights`` for weights from the Hub

EMBEDDED = "dinov2s_derived"
EMBEDDED_DEPTH = 10  # of 12 blocks: the last two were fine-tuned for another task, and features are better without them
EMBEDDED_IMG_SIZE = 98
