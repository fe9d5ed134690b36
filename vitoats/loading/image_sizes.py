"""Refuses images of a size that a model does not take, and names sizes that it does."""

from typing import Any

import torch

from vitoats.common.errors import InputError, one_line
from vitoats.loading.loaded import LoadedModel
from vitoats.models.inputs import ImageInputs


@torch.inference_mode()
def check_image_size(loaded: LoadedModel) -> None:
    """Runs a model on one image, unless it was published for images of this size.

    Raises:
        InputError: the model does not take such images.
    """
    size = loaded.preprocessing.img_size
    model = loaded.timm_model
    published = {model.pretrained_cfg[key][-1] for key in ("input_size", "test_input_size") if model.pretrained_cfg.get(key)}
    if size in published or loaded.about:
        return
    error = _failure(model, size)
    if error is not None:
        raise InputError(
            f"{loaded.name} takes no images of {size} px ({one_line(error, 100)}): {_remedy(model, size, published)}"
        )


def _failure(model: Any, size: int) -> Exception | None:
    """The error of a model that does not take images of a size."""
    inputs = ImageInputs(size)
    try:
        inputs.call(model, inputs.zeros(1).to(next(model.parameters()).device))
    except (MemoryError, InputError):
        raise
    except Exception as error:  # architectures raise various errors on images that do not fit
        return error
    return None


def _remedy(model: Any, size: int, published: set[int]) -> str:
    usual = " or ".join(str(size) for size in sorted(published)) or "its own size"
    step = max((level["reduction"] for level in getattr(model, "feature_info", []) if "reduction" in level), default=1)
    if size % step:
        return f"give `img_size` a multiple of {step}, or {usual}"
    return f"give `img_size` {usual}"
