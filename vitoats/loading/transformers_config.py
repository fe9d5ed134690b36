"""Reads the folder of a transformers model: config.json becomes timm's architecture and arguments, preprocessor_config.json its
preprocessing. Both are untrusted, as timm's config.json is.

DINOv2 and DINOv3 take the images that the preprocessor crops; transformers resizes DINOv2's positions for them.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from vitoats.common.errors import InputError, one_line
from vitoats.common.json_files import read_json
from vitoats.common.plain_values import item, number, whole
from vitoats.data.transforms import MAX_IMG_SIZE
from vitoats.loading.timm_config import CONFIG, LARGEST_NUMBER, TimmConfig

PREPROCESSOR = "preprocessor_config.json"
FILTERS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # in the order of Pillow's numbers
ACTIVATIONS = {
    "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu", "relu": "relu", "silu": "silu", "swish": "silu",
}  # fmt: skip
HALF = (0.5, 0.5, 0.5)
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
REMEDY = "convert it to a timm folder, or use the timm model of its kind (`model` hf-hub:timm/...)"


def is_transformers(folder: Path) -> bool:
    """Whether a folder's config.json is one of transformers."""
    said = read_json(folder / CONFIG)
    return isinstance(said, dict) and "model_type" in said and "architecture" not in said


def read_transformers(folder: Path) -> TimmConfig:
    """The timm configuration of a transformers folder.

    Raises:
        InputError: the model is of a kind that timm has no architecture for, or the files are damaged.
    """
    path, said = folder / CONFIG, read_json(folder / CONFIG)
    kind = said["model_type"]
    vision = said.get("vision_config", said) if kind in ("clip", "siglip") else said
    if not isinstance(kind, str) or kind not in KINDS:
        named, kinds = repr(str(kind)[:50]), ", ".join(KINDS)
        raise InputError(f"{folder} is a transformers model of the type {named}, not one of {kinds}: {REMEDY}")
    try:
        architecture, arguments, (mean, std) = KINDS[kind](vision)
        arguments |= {
            "img_size": whole(_side(item(vision, "image_size")), "image_size", 1),
            "patch_size": whole(_side(item(vision, "patch_size")), "patch_size", 1),
            "embed_dim": _count(vision, "hidden_size"),
            "depth": _count(vision, "num_hidden_layers"),
            "num_heads": _count(vision, "num_attention_heads"),
        }
        if whole(vision.get("num_channels", 3), "num_channels", 1) != 3:
            raise ValueError(f"it takes {vision['num_channels']} channels, not 3")
        images = _images(folder, arguments["img_size"]) or {"mean": mean, "std": std}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        reason = one_line(error, 100)
        raise InputError(f"{folder} is a transformers model that cannot be converted ({reason}): {REMEDY}") from None
    size = images.pop("img_size", arguments["img_size"])
    if not max(size, arguments["img_size"]) <= MAX_IMG_SIZE:
        raise InputError(f"{path} has images of {size} px: sizes go from 1 to {MAX_IMG_SIZE}")
    own = arguments["img_size"]
    preprocessing = {"crop_pct": 1.0, "interpolation": "bicubic", "num_classes": 0, "first_conv": "patch_embed.proj"}
    return TimmConfig(
        path,
        architecture,
        preprocessing | {"classifier": "head", "input_size": [3, own, own]} | images,
        arguments,
        img_size=None if size == own else size,
        pos_resample="hf" if kind.startswith("dinov2") else None,
    )


def _vit(said: dict[str, Any]) -> tuple[str, dict[str, Any], Any]:
    arguments = {"mlp_ratio": _ratio(said), "act_layer": _activation(said), "qkv_bias": said.get("qkv_bias", True) is True}
    return "vit_base_patch16_224", arguments, (HALF, HALF)


def _deit(said: dict[str, Any]) -> tuple[str, dict[str, Any], Any]:
    return "deit_base_distilled_patch16_224", {"mlp_ratio": _ratio(said), "act_layer": _activation(said)}, IMAGENET


def _dinov2(said: dict[str, Any]) -> tuple[str, dict[str, Any], Any]:
    registers = _count(said, "num_register_tokens") if said["model_type"].endswith("registers") else 0
    width, ratio = _count(said, "hidden_size"), number(said.get("mlp_ratio", 4), "mlp_ratio", 0)
    size, act = "small", _activation(said)
    if said.get("use_swiglu_ffn"):  # of the gate and the rest, in one layer
        size, act, ratio = "giant", "silu", 2 * ((int(int(width * ratio) * 2 / 3) + 7) // 8 * 8) / width
    arguments = {"mlp_ratio": ratio, "act_layer": act, "qkv_bias": said.get("qkv_bias", True) is True}
    if registers:
        return f"vit_{size}_patch14_reg4_dinov2", arguments | {"reg_tokens": registers}, IMAGENET
    return f"vit_{size}_patch14_dinov2", arguments, IMAGENET


def _dinov3(said: dict[str, Any]) -> tuple[str, dict[str, Any], Any]:
    if not all(said.get(key, True) for key in ("proj_bias", "mlp_bias")) or said.get("key_bias", False):
        raise ValueError("its biases are not those of DINOv3")
    bias = {bool(said.get(key, True)) for key in ("query_bias", "value_bias")}
    if len(bias) > 1:
        raise ValueError("it has a bias of q or of v alone")
    gated = bool(said.get("use_gated_mlp"))
    if _activation(said) != ("silu" if gated else "gelu"):
        raise ValueError("its activation is not that of DINOv3")
    arguments = {
        "mlp_ratio": _ratio(said),
        "num_reg_tokens": whole(said.get("num_register_tokens", 0), "num_register_tokens"),
        "rope_temperature": number(said.get("rope_theta", 100.0), "rope_theta", above=0),
        "global_pool": "token",
    }
    plus, qkvb = "plus_" if gated else "", "_qkvb" if bias == {True} else ""
    return f"vit_small_{plus}patch16_dinov3{qkvb}", arguments, IMAGENET


def _clip(said: dict[str, Any]) -> tuple[str, dict[str, Any], Any]:
    arguments = {"mlp_ratio": _ratio(said), "act_layer": _activation(said, "quick_gelu")}
    return "vit_base_patch16_clip_224", arguments, CLIP


def _siglip(said: dict[str, Any]) -> tuple[str, dict[str, Any], Any]:
    if not said.get("vision_use_head", True):
        raise ValueError("it has no attention pooling")
    arguments = {"mlp_ratio": _ratio(said), "act_layer": _activation(said, "gelu_pytorch_tanh")}
    return "vit_base_patch16_siglip_224", arguments, (HALF, HALF)


KINDS: dict[str, Callable[[dict[str, Any]], tuple[str, dict[str, Any], Any]]] = {
    "vit": _vit,
    "deit": _deit,
    "dinov2": _dinov2,
    "dinov2_with_registers": _dinov2,
    "dinov3_vit": _dinov3,
    "clip": _clip,
    "clip_vision_model": _clip,
    "siglip": _siglip,
    "siglip_vision_model": _siglip,
}


def _activation(said: dict[str, Any], usual: str = "gelu") -> str:
    return ACTIVATIONS[said.get("hidden_act", usual)]


def _count(said: dict[str, Any], key: str) -> int:
    value = whole(item(said, key), key, 1)
    if value > LARGEST_NUMBER:
        raise ValueError(f"{key} is out of range")
    return value


def _ratio(said: dict[str, Any]) -> float:
    return _count(said, "intermediate_size") / _count(said, "hidden_size")


def _side(value: Any) -> Any:
    """One number for both sides of a square."""
    if isinstance(value, dict):
        value = [value.get("height"), value.get("width")]
    return value[0] if isinstance(value, list) and len(set(map(str, value))) == 1 else value


def _images(folder: Path, img_size: int) -> dict[str, Any] | None:
    """timm's words for the preprocessing, and the ``img_size``; None if the folder does not say."""
    path = folder / PREPROCESSOR
    if not path.is_file():
        return None
    said = read_json(path)
    normal, resample = said.get("do_normalize", True), said.get("resample", 3)
    found = {
        "mean": [number(x, "image_mean") for x in said["image_mean"]] if normal else [0.0] * 3,
        "std": [number(x, "image_std", above=0) for x in said["image_std"]] if normal else [1.0] * 3,
        "interpolation": FILTERS[resample] if resample in range(len(FILTERS)) else "bicubic",
    }
    size = said.get("size", img_size)
    short = size.get("shortest_edge") if isinstance(size, dict) else size
    resized = whole(short if short is not None else _side(size), "size", 1)
    if said.get("do_center_crop") and "crop_size" in said:
        cropped = whole(_side(said["crop_size"]), "crop_size", 1)
        return found | {"img_size": cropped, "crop_pct": cropped / resized}
    squash = {"crop_mode": "squash"} if isinstance(size, dict) and short is None else {}
    return found | {"img_size": resized, "crop_pct": 1.0} | squash
