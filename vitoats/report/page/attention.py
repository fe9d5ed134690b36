"""Attention maps of a vision model, of its sparse and of its low-rank terms alone, by attention rollout.

Rollout (Abnar and Zuidema, arXiv 2005.00928) follows attention through all blocks. With A the mean over the heads of a
block, and the identity for its residual path,

    A' = (A + I) / 2    R = A'_last ... A'_2 A'_1

and R[i, j] says how much token i at the end looks at token j of the image. "S alone" is the model with y = x S^T + b in each
compressed layer, "U V alone" the one with y = x (U V)^T + b.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from PIL import Image
from torch import Tensor, nn

from vitoats.common.errors import InputError
from vitoats.format.layers import compressed_layers, linear, replace_module
from vitoats.loading.loaded import LoadedModel
from vitoats.models.hooks import watch_inputs
from vitoats.report.page.document import Gallery, Missing, Part, Picture, Section, Table, number, png

PIXELS = 168  # of a side of a picture
GREY, MAP = 0.45, 0.75  # weights of the image and of the map in an overlay
DENSE, COMPRESSED, SPARSE, LOW_RANK = "dense", "compressed", "S alone", "U V alone"


def with_one_term(model: nn.Module, term: str) -> nn.Module:
    """A copy of a model whose compressed layers have one of their terms alone, ``SPARSE`` or ``LOW_RANK``."""
    copied = copy.deepcopy(model)
    for name, layer in compressed_layers(copied).items():
        weight = layer.S if term == SPARSE else torch.cat([u @ v for u, v in zip(layer.U, layer.V, strict=True)])
        replace_module(copied, name, linear(weight.detach(), layer.bias))
    return copied.eval()


@torch.inference_mode()
def attention_of(model: nn.Module, images: Tensor) -> list[Tensor]:
    """The attention of each block, [n, heads, tokens, tokens], in the order in which they run.

    Raises:
        InputError: a block's attention is not that of all tokens to all tokens.
    """
    modules = {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "fused_attn") and isinstance(getattr(module, "attn_drop", None), nn.Module)
    }
    fused = {name: module.fused_attn for name, module in modules.items()}
    found: list[Tensor] = []
    try:
        for module in modules.values():
            module.fused_attn = False
        with watch_inputs({name: module.attn_drop for name, module in modules.items()}, lambda _, x: found.append(x)):
            model(images)
    finally:
        for name, module in modules.items():
            module.fused_attn = fused[name]
    shape = (len(images), *found[0].shape[2:]) if found and found[0].ndim == 4 else ()
    if len(shape) != 3 or shape[1] != shape[2] or any(x.ndim != 4 or (len(x), *x.shape[2:]) != shape for x in found):
        raise InputError(f"the attention of {type(model).__name__} is not that of all tokens to all tokens")
    return found


def rollout(attention: Sequence[Tensor]) -> Tensor:
    """R [n, tokens, tokens] of the attention of all blocks, [n, heads, tokens, tokens] each; its rows add up to 1."""
    identity = torch.eye(attention[0].shape[-1])
    R = identity
    for A in attention:
        R = (A.mean(dim=1) + identity) / 2 @ R
    return R


def attention_maps(model: Any, images: Tensor) -> np.ndarray:
    """What the class token looks at, or all patches in the mean where there is none: [n, rows, columns] of patches.

    Raises:
        InputError: the model has no such attention.
    """
    R = rollout(attention_of(model, images))
    prefix = getattr(model, "num_prefix_tokens", 0)
    seen = R[:, 0, prefix:] if prefix else R.mean(dim=1)
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if grid is None or grid[0] * grid[1] != seen.shape[1]:
        raise InputError(f"the tokens of {type(model).__name__} are not its patches")
    return seen.reshape(len(images), *grid).double().numpy()


def attention_section(run: str, loaded: LoadedModel, dense: LoadedModel | None, images: Tensor, source: str) -> Section:
    """The attention maps on images [n, channels, h, w] as the model takes them; ``source`` says where they come from."""
    lead = (
        "Attention rollout: what the class token of the last block looks at, followed through all blocks. S alone and U V "
        f"alone are the model of {run} with one of the two terms of each compressed layer and its bias. Images: {source}."
    )
    section = Section("attention", "Attention", lead)
    section.parts.extend(_maps(loaded, dense, images))
    return section


def _maps(loaded: LoadedModel, dense: LoadedModel | None, images: Tensor) -> list[Part]:
    model = loaded.timm_model
    has_rank = any(layer.rank for layer in compressed_layers(model).values())
    missing: list[Part] = []
    try:
        maps = {DENSE: attention_maps(dense.timm_model, images)} if dense else {}
        maps[COMPRESSED] = attention_maps(model, images)
        maps[SPARSE] = attention_maps(with_one_term(model, SPARSE), images)
        if has_rank:
            maps[LOW_RANK] = attention_maps(with_one_term(model, LOW_RANK), images)
    except InputError as error:
        return [Missing(f"attention maps: {error}")]
    if not dense:
        missing.append(Missing("attention maps of the dense model", "add --dense MODEL"))
    if not has_rank:
        missing.append(Missing("U V alone: no layer has a low-rank term"))
    pictures = _pixels(images, loaded.preprocessing.mean, loaded.preprocessing.std)
    rows: list[tuple[str, list[Picture | None]]] = []
    for i, pixels in enumerate(pictures):
        cells: list[Picture | None] = [png(_sized(pixels), f"image {i + 1}")]
        for name, of_all in maps.items():
            cells.append(png(overlay(pixels, of_all[i]), f"attention of image {i + 1}, {name}: {_where(of_all[i])}"))
        rows.append((f"image {i + 1}", cells))
    gallery = Gallery("Attention rollout; brighter is more", ("image", *maps), rows)
    return [gallery, agreement(maps), *missing]


def agreement(maps: Mapping[str, np.ndarray]) -> Table:
    """The mean correlation over images between every two kinds of maps, [n, rows, columns] each."""
    names = list(maps)
    rows = []
    for a in names:
        cells = []
        for b in names:
            pairs = zip(maps[a].reshape(len(maps[a]), -1), maps[b].reshape(len(maps[b]), -1), strict=True)
            cells.append(number(float(np.mean([correlation(x, y) for x, y in pairs])), ".2f"))
        rows.append((a, *cells))
    return Table(
        "Correlation of the maps: 1 where they look at the same, 0 where they have nothing in common", ("", *names), rows
    )


def correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's correlation; 0 if one of them is constant."""
    x, y = x - x.mean(), y - y.mean()
    norms = float(np.linalg.norm(x) * np.linalg.norm(y))
    return float(x @ y) / norms if norms > 1e-12 else 0.0


def overlay(pixels: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """A map [rows, columns] over an image uint8 [h, w, 3]: uint8, sized for the page."""
    image = _sized(pixels).astype(float) / 255
    low, high = np.percentile(seen, [1, 99])
    scaled = np.clip((seen - low) / max(high - low, 1e-12), 0, 1)
    smooth = Image.fromarray((255 * scaled).astype(np.uint8)).resize((image.shape[1], image.shape[0]), Image.Resampling.BICUBIC)
    strength = np.asarray(smooth, dtype=float)[..., None] / 255
    colours = colormaps["inferno"](strength[..., 0])[..., :3]
    mixed = GREY * image.mean(axis=2, keepdims=True) * (1 - MAP * strength) + MAP * colours
    return (255 * np.clip(mixed, 0, 1)).astype(np.uint8)


def _sized(pixels: np.ndarray) -> np.ndarray:
    height, width = pixels.shape[:2]
    scale = PIXELS / max(height, width)
    return np.asarray(Image.fromarray(pixels).resize((round(width * scale), round(height * scale)), Image.Resampling.LANCZOS))


def _pixels(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Preprocessed images as uint8 [n, h, w, 3]; of other than three channels, the first one in grey."""
    shown = images * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    shown = shown if shown.shape[1] == 3 else shown[:, :1].expand(-1, 3, -1, -1)
    return (255 * shown.clamp(0, 1)).round().byte().permute(0, 2, 3, 1).numpy()


def _where(seen: np.ndarray) -> str:
    """Where a map is strongest, in words."""
    row, column = np.unravel_index(int(seen.argmax()), seen.shape)
    vertical = ("top", "middle", "bottom")[int(3 * row / seen.shape[0])]
    horizontal = ("left", "centre", "right")[int(3 * column / seen.shape[1])]
    return f"strongest at the {vertical} {horizontal}"
