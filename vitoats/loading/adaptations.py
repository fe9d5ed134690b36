"""What timm changes silently so that weights of one shape fit a model of another: found here by their shapes, and said.

Position embeddings are resized to another number of patches, patch embeddings to another patch size, and tables of relative
positions to another window. All of these cost accuracy.
"""

import logging
import math
from collections.abc import Mapping
from typing import Any

from vitoats.common.errors import InputError
from vitoats.common.sizes import ImageSize, sides
from vitoats.data.pixels import MODES

log = logging.getLogger("vitoats")

Shapes = Mapping[str, tuple[int, ...]]  # of the tensors in a file, by name

POSITIONS, PATCHES, TABLE = "pos_embed", "patch_embed.proj.weight", "relative_position_bias_table"


def size_of_weights(shapes: Shapes, model: Any) -> int | None:
    """The image size in pixels that a file's position embedding is for; None if it is the model's own or cannot be told.

    Args:
        shapes: the file's tensors.
        model: the model at its usual size; it may be on the meta device.
    """
    grid, own = _grid(shapes, model), _grid(shapes_of(model), model)
    if None in (grid, own) or grid == own or _patch(shapes) != _patch(shapes_of(model)):
        return None
    return grid * model.patch_embed.patch_size[0]


def channels(shapes: Shapes, model: Any) -> int | None:
    """Number of channels of the images that a file's weights are for; None if it cannot be told.

    Args:
        shapes: the file's tensors.
        model: the model; it may be on the meta device.
    """
    first = getattr(model, "pretrained_cfg", {}).get("first_conv") or PATCHES.removesuffix(".weight")
    shape = shapes.get(f"{first if isinstance(first, str) else first[0]}.weight", ())
    return shape[1] if len(shape) == 4 else None


def check_channels(source: str, shapes: Shapes, model: Any, asked: bool) -> None:
    """Refuses weights for images with another number of channels, or says that they are changed if that was asked for.

    Args:
        source: the file with the weights.
        shapes: its tensors.
        model: the model; it may be on the meta device.
        asked: whether the user asked for a number of channels.

    Raises:
        InputError: the file's first layer takes other channels than the model's, and nobody asked for these.
    """
    held, own = channels(shapes, model), channels(shapes_of(model), model)
    if None in (held, own) or held == own:
        return
    if not asked:
        remedy = f"add `model_kwargs` in_chans={held}" if held in MODES else "give weights for RGB images"
        raise InputError(f"the weights {source} take {held}-channel images, the model {own}-channel ones: {remedy}")
    say_channels(source, held, own)


def say_channels(source: str, held: int | None, own: int | None) -> None:
    """Warns that the first layer is made for other images than those it was trained on."""
    log.warning(
        "the first layer of the weights %s, for %d channels, is adapted to %d; this may cost accuracy", source, held, own
    )


def say_changes(source: str, shapes: Shapes, model: Any, asked: bool) -> None:
    """Logs what was changed to make the weights fit.

    Args:
        source: the file with the weights.
        shapes: its tensors.
        model: the model with these weights.
        asked: whether the user asked for an image size; otherwise, the log line is a warning.
    """
    now = shapes_of(model)
    changes = []
    if _patch(shapes) and _patch(now) and _patch(shapes) != _patch(now):
        kept = f" (`model_kwargs` patch_size={shapes[PATCHES][-1]} keeps them)"
        changes.append(f"patches of {_patch(shapes)} pixels to {_patch(now)}{kept}")
        asked = False
    before, after = _grid(shapes, model), getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if POSITIONS in now and before and after and after != (before, before):
        changes.append(f"positions of {before} x {before} patches to {' x '.join(map(str, model.patch_embed.grid_size))}")
    tables = [name for name, shape in shapes.items() if name.endswith(TABLE) and now.get(name, shape) != shape]
    if tables:
        changes.append(f"{len(tables)} tables of relative positions")
    if changes:
        log.log(
            logging.INFO if asked else logging.WARNING,
            "the weights %s are resized to fit the model: %s; this may cost accuracy",
            source,
            ", ".join(changes),
        )


def shapes_of(model: Any) -> Shapes:
    """The shapes of a model's tensors, by name."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def patches_of(shapes: Shapes, model: Any) -> int | None:
    """The number of patches for which there are positions; None if there are none at all, or fewer than of other tokens.

    Args:
        shapes: the tensors of a file or a model.
        model: the model; it may be on the meta device.
    """
    shape = shapes.get(POSITIONS, ())
    if len(shape) != 3 or not hasattr(getattr(model, "patch_embed", None), "patch_size"):
        return None
    others = 0 if getattr(model, "no_embed_class", False) else getattr(model, "num_prefix_tokens", 0)
    return shape[1] - others if shape[1] > others else None


def count_patches(model: Any, img_size: ImageSize) -> int | None:
    """The number of patches of an image; None for a model without patches."""
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    return None if patch is None else math.prod(side // length for side, length in zip(sides(img_size), patch, strict=True))


def check_numbers(source: str, held: Mapping[str, Any], model: Any) -> None:
    """Refuses whole numbers in the place of floats, as weights have that were quantized without their scales.

    Raises:
        InputError: a tensor of the file is one of these.
    """
    own = model.state_dict()
    whole = next((n for n, t in held.items() if n in own and own[n].is_floating_point() and not t.is_floating_point()), None)
    if whole is not None:
        raise InputError(f"{source} has whole numbers for the weight {whole}: give `checkpoint` weights that are not quantized")


def _grid(shapes: Shapes, model: Any) -> int | None:
    """The number of patches along a side for which there are positions; None if there is no such square."""
    n = patches_of(shapes, model) or 0
    grid = math.isqrt(n)
    return grid if grid > 0 and grid * grid == n else None


def _patch(shapes: Shapes) -> str:
    """The size of a patch, in words; "" if the file does not say."""
    shape = shapes.get(PATCHES, ())
    return f"{shape[-2]} x {shape[-1]}" if len(shape) == 4 else ""
