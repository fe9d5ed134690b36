"""Refuses images of a size that a model does not take, and names sizes that it does."""

from typing import Any

import torch

from vitoats.common.errors import InputError, one_line
from vitoats.common.sizes import ImageSize, image_size, in_words, sides
from vitoats.loading.loaded import LoadedModel
from vitoats.models.inputs import ImageInputs


def check_multiple(name: str, model: Any, img_size: ImageSize) -> None:
    """Refuses an image size that is not made of whole patches.

    Raises:
        InputError: a side is no multiple of the patch size.
    """
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None) or 1
    for side, step in zip(sides(img_size), (patch, patch) if isinstance(patch, int) else patch, strict=True):
        if side % step:
            raise InputError(f"{name} takes image sizes that are multiples of {step}, not {side}: change `img_size`")


@torch.inference_mode()
def check_image_size(loaded: LoadedModel) -> None:
    """Runs a model on one image, unless it was published for images of this size.

    Raises:
        InputError: the model does not take such images.
    """
    size = loaded.preprocessing.img_size
    model = loaded.timm_model
    sizes = [model.pretrained_cfg[key] for key in ("input_size", "test_input_size") if model.pretrained_cfg.get(key)]
    published = {image_size(*chw[1:]) for chw in sizes}
    if size in published and loaded.preprocessing.channels in {chw[0] for chw in sizes}:
        return
    error = _failure(model, loaded.inputs)
    if error is not None:
        said = f"{in_words(size)} px ({one_line(error, 100)})"
        raise InputError(f"{loaded.name} takes no images of {said}: {_remedy(model, size, published)}")


def _failure(model: Any, inputs: ImageInputs) -> Exception | None:
    """The error of a model that does not take such images."""
    try:
        inputs.call(model, inputs.zeros(1).to(next(model.parameters()).device))
    except (MemoryError, InputError):
        raise
    except Exception as error:  # architectures raise various errors on images that do not fit
        return error
    return None


def _remedy(model: Any, size: ImageSize, published: set[ImageSize]) -> str:
    usual = " or ".join(map(in_words, sorted(published, key=sides))) or "its own size"
    step = max((level["reduction"] for level in getattr(model, "feature_info", []) if "reduction" in level), default=1)
    suits = not any(side % step for one in published for side in sides(one))  # some architectures state a wrong reduction
    if suits and any(side % step for side in sides(size)):
        return f"give `img_size` a multiple of {step}, or {usual}"
    return f"give `img_size` {usual}"
