"""Converts vision transformers that other libraries saved: names, fused q, k and v, and tokens.

open_clip     its own image towers (visual.conv1, visual.transformer.resblocks, ...). Those of timm need no conversion.
torchvision   ViT.
transformers  ViT, DeiT, DINOv2 with and without registers, DINOv3, and the image towers of CLIP and SigLIP.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitoats.common.errors import InputError
from vitoats.loading.adaptations import Shapes, shapes_of

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Converted:
    """Converted tensors.

    Attributes:
        state: the tensors, in names that timm's loading of the model takes.
        shapes: their shapes, in the model's own names.
        left_out: names of tensors that the model has no place for.
        head: weight and bias of a classifier on the class token and the mean of the patch tokens.
    """

    state: dict[str, Tensor]
    shapes: Shapes
    left_out: list[str] = field(default_factory=list)
    head: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class Format:
    """Another library's format.

    Attributes:
        name: the library.
        anchors: names, without a prefix, one of which every file in this format has.
        convert: from the tensors behind a prefix, those beside it, and the model; None if they have another format.
    """

    name: str
    anchors: tuple[str, ...]
    convert: Callable[[Tensors, Tensors, Any], Converted | None]

    def prefixes(self, names: Tensors) -> Iterator[str]:
        """What stands before an anchor."""
        for anchor in self.anchors:
            for name in names:
                if name == anchor or name.endswith("." + anchor):
                    yield name.removesuffix(anchor)


# ---- open_clip

OPEN_CLIP = (
    ("transformer.resblocks.", "blocks."), ("conv1", "patch_embed.proj"), ("positional_embedding", "pos_embed"),
    ("class_embedding", "cls_token"), ("ln_pre", "norm_pre"), ("ln_post", "norm"), ("ln_", "norm"), ("in_proj_", "qkv."),
    ("out_proj", "proj"), ("mlp.c_fc", "mlp.fc1"), ("mlp.c_proj", "mlp.fc2"),
)  # fmt: skip


def _from_open_clip(inside: Tensors, beside: Tensors, model: Any) -> Converted | None:
    """timm converts these itself, if they stand behind visual."""
    if "class_embedding" not in inside or not any(name.startswith("transformer.resblocks.") for name in inside):
        return None
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in inside.items():
        shape = tuple(tensor.shape)
        if name == "proj":
            shapes |= {"head.weight": shape[::-1], "head.bias": shape[1:]}
            continue
        for theirs, ours in OPEN_CLIP:
            name = name.replace(theirs, ours)
        shapes[name] = (1,) * (3 - len(shape)) + shape if name in ("cls_token", "pos_embed") else shape
    return Converted({"visual." + name: tensor for name, tensor in inside.items()}, shapes, list(beside))


# ---- torchvision

TORCHVISION = (
    (r"^class_token$", "cls_token"), (r"^encoder\.pos_embedding$", "pos_embed"), (r"^conv_proj\.", "patch_embed.proj."),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."), (r"^encoder\.ln\.", "norm."), (r"\.ln_([12])\.", r".norm\1."),
    (r"\.self_attention\.in_proj_", ".attn.qkv."), (r"\.self_attention\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.(0|linear_1)\.", ".mlp.fc1."), (r"\.mlp\.(3|linear_2)\.", ".mlp.fc2."),
    (r"^heads\.(head\.)?(?=weight|bias)", "head."),
)  # fmt: skip


def _from_torchvision(inside: Tensors, beside: Tensors, model: Any) -> Converted | None:
    if "class_token" not in inside or not any(name.startswith("encoder.layers.encoder_layer_") for name in inside):
        return None
    state = {}
    for name, tensor in inside.items():
        for theirs, ours in TORCHVISION:
            name = re.sub(theirs, ours, name)
        state[name] = tensor
    return Converted(state, {name: tuple(tensor.shape) for name, tensor in state.items()}, list(beside))


# ---- transformers: of each name, the first pattern that matches is replaced; in files, and in memory (version 5)

LAYER = r"^(?:encoder\.|model\.)?layers?\.(\d+)\."
TRANSFORMERS = [
    (r"^embeddings\.(?:cls_token|class_embedding)$", "cls_token"),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^embeddings\.distillation_token$", "dist_token"),
    (r"^embeddings\.position_embeddings?(?:\.weight)?$", "pos_embed"),
    (r"^embeddings\.patch_embeddings?\.(?:projection\.)?(weight|bias)$", r"patch_embed.proj.\1"),
    (LAYER + r"(?:attention\.attention\.|attention\.|self_attn\.)(query|key|value|[qkv]_proj)\.", r"blocks.\1.attn.\2."),
    (LAYER + r"(?:attention\.output\.dense|attention\.o_proj|self_attn\.out_proj)\.", r"blocks.\1.attn.proj."),
    (LAYER + r"(?:layernorm_before|layer_norm1|norm1)\.", r"blocks.\1.norm1."),
    (LAYER + r"(?:layernorm_after|layer_norm2|norm2)\.", r"blocks.\1.norm2."),
    (LAYER + r"(?:layer_scale1\.lambda1|lambda_1)$", r"blocks.\1.ls1.gamma"),
    (LAYER + r"(?:layer_scale2\.lambda1|lambda_2)$", r"blocks.\1.ls2.gamma"),
    (LAYER + r"mlp\.gate_proj\.", r"blocks.\1.mlp.fc1_g."),
    (LAYER + r"(?:intermediate\.dense|mlp\.(?:fc1|weights_in|up_proj))\.", r"blocks.\1.mlp.fc1."),
    (LAYER + r"(?:output\.dense|mlp\.(?:fc2|weights_out|down_proj))\.", r"blocks.\1.mlp.fc2."),
    (r"^(?:layernorm|post_layernorm|norm)\.", "norm."),
    (r"^pre_layrnorm\.", "norm_pre."),
    (r"^head\.probe$", "attn_pool.latent"),
    (r"^head\.attention\.in_proj_(weight|bias)$", r"attn_pool.in_proj.\1"),
    (r"^head\.attention\.out_proj\.", "attn_pool.proj."),
    (r"^head\.layernorm\.", "attn_pool.norm."),
    (r"^head\.mlp\.", "attn_pool.mlp."),
]
QKV = ((".attn.query.", ".attn.key.", ".attn.value."), (".attn.q_proj.", ".attn.k_proj.", ".attn.v_proj."))
NO_WEIGHTS = ("position_ids", "embeddings.mask_token")  # left out without a word


def _from_transformers(inside: Tensors, beside: Tensors, model: Any) -> Converted | None:
    state, left_out = {}, []
    for name, tensor in inside.items():
        converted = _renamed(name)
        if converted:
            state[converted] = tensor
        elif not name.endswith(NO_WEIGHTS):
            left_out.append(name)
    if "patch_embed.proj.weight" not in state or not any(name.startswith("blocks.") for name in state):
        return None
    expected = shapes_of(model)
    state = _named_as_expected(_fused(_gated(state), expected), expected)
    _set_tokens(state, model)
    head = None
    for name, tensor in {**beside, **{name: inside[name] for name in left_out}}.items():
        if re.fullmatch(r"(cls_)?classifier\.weight|visual_projection\.weight", name) and tensor.ndim == 2:
            bias = {**inside, **beside}.get(name.removesuffix("weight") + "bias", torch.zeros(len(tensor)))
            if tensor.shape[1] == model.num_features:
                state |= {"head.weight": tensor, "head.bias": bias}
            elif tensor.shape[1] == 2 * model.num_features:
                head = tensor, bias
            else:
                left_out.append(name)
        elif name.startswith("distillation_classifier."):
            state["head_dist." + name.rpartition(".")[2]] = tensor
        elif name in beside and not re.fullmatch(r"(cls_)?classifier\.bias", name) and not name.endswith(NO_WEIGHTS):
            left_out.append(name)
    left_out = [name for name in left_out if not re.fullmatch(r"(cls_)?classifier\.(weight|bias)", name)]
    return Converted(state, {name: tuple(tensor.shape) for name, tensor in state.items()}, left_out, head)


def _renamed(name: str) -> str | None:
    for pattern, ours in TRANSFORMERS:
        made, found = re.subn(pattern, ours, name, count=1)
        if found:
            return made
    return None


def _gated(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Beside a gate, the layer up_proj is timm's fc1_x."""
    gated = any(".mlp.fc1_g." in name for name in state)
    return {name.replace(".mlp.fc1.", ".mlp.fc1_x.") if gated else name: tensor for name, tensor in state.items()}


def _fused(state: dict[str, Tensor], expected: Shapes) -> dict[str, Tensor]:
    """Stacks q, k and v if the model has them in one matrix; a bias that only some of them have is zero in the others."""
    made = {name: tensor for name, tensor in state.items() if not any(part in name for parts in QKV for part in parts)}
    for block in sorted({name.partition(".attn.")[0] for name in state if name.startswith("blocks.")}):
        parts: dict[str, dict[str, Tensor]] = {}
        for theirs in QKV:
            for q_k_v, infix in zip("qkv", theirs, strict=True):
                for kind in ("weight", "bias"):
                    if (tensor := state.get(f"{block}{infix}{kind}")) is not None:
                        parts.setdefault(kind, {})[q_k_v] = tensor
        for kind, found in parts.items():
            zero = torch.zeros_like(next(iter(found.values())))
            q, k, v = (found.get(part, zero) for part in "qkv")
            if kind == "bias" and f"{block}.attn.q_bias" in expected:  # timm's EVA: k has none
                made |= {f"{block}.attn.q_bias": q, f"{block}.attn.v_bias": v}
            elif q.ndim == k.ndim == v.ndim:
                made[f"{block}.attn.qkv.{kind}"] = torch.cat([q, k, v])
    for kind in ("weight", "bias"):  # attention pooling has q alone, and k and v in one matrix
        stacked = made.pop(f"attn_pool.in_proj.{kind}", None)
        if stacked is not None and len(stacked) % 3 == 0:
            q, k, v = stacked.chunk(3)
            made |= {f"attn_pool.q.{kind}": q, f"attn_pool.kv.{kind}": torch.cat([k, v])}
    return made


def _named_as_expected(state: dict[str, Tensor], expected: Shapes) -> dict[str, Tensor]:
    """timm's EVA has layer scales under another name."""
    if not any(name.endswith(".gamma_1") for name in expected):
        return state
    return {re.sub(r"\.ls([12])\.gamma$", r".gamma_\1", name): tensor for name, tensor in state.items()}


def _set_tokens(state: dict[str, Tensor], model: Any) -> None:
    """Gives tokens and positions timm's shapes; a class token without a position takes that of the file."""
    for name in ("cls_token", "pos_embed", "dist_token", "reg_token"):
        if name in state and state[name].ndim < 3:
            state[name] = state[name].reshape(*(1,) * (3 - state[name].ndim), *state[name].shape)
    if "reg_token" in state and not state["reg_token"].numel():
        del state["reg_token"]
    if getattr(model, "no_embed_class", False) and "cls_token" in state and "pos_embed" in state:
        state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
        state["pos_embed"] = state["pos_embed"][:, 1:]


def without_zero_biases(file: Path, state: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Leaves out the biases of q, k and v in Meta's DINOv3 files for a model without them; timm would, whatever they are.

    Raises:
        InputError: they are not zero. (The bias of k is never used.)
    """
    biases = [name for name in state if name.endswith(".attn.qkv.bias")] if "storage_tokens" in state else []
    if not biases or any(name.endswith((".attn.q_bias", ".attn.qkv.bias")) for name in shapes_of(model)):
        return state
    for name in biases:
        q, _, v = state[name].chunk(3)
        if q.any() or v.any():
            raise InputError(
                f"the weights {file} have biases of q and v, for which the model has no place: "
                f"use a dinov3_ name, or the timm model whose name ends in _qkvb (`model`)"
            )
    return {name: tensor for name, tensor in state.items() if name not in biases}


PATCH_EMBEDDINGS = tuple(
    f"embeddings.{name}.weight" for name in ("patch_embeddings.projection", "patch_embeddings", "patch_embedding")
)
FORMATS = (
    Format("open_clip", ("conv1.weight",), _from_open_clip),
    Format("torchvision", ("conv_proj.weight",), _from_torchvision),
    Format("transformers", PATCH_EMBEDDINGS, _from_transformers),
)
