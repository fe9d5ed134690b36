"""Makes torchvision (and so timm) importable with a CPU build of torch. Import this module before either of them.

torchvision's wheel links CUDA libraries. With a CPU build of torch its operators cannot be loaded, and its import then
fails because it registers fake kernels for two operators, ``nms`` and ``qnms``, that were never declared. Declaring their
schemas is enough: nothing here calls them, and torchvision still reports clearly that they are missing if other code does.
"""

import importlib.util
from pathlib import Path

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def _declare_missing_operators() -> torch.library.Library | None:
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        return None
    try:
        torch.ops.load_library(str(Path(spec.submodule_search_locations[0]) / "_C.so"))
        return None
    except OSError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for schema in _SCHEMAS:
            library.define(schema)
        return library


_library = _declare_missing_operators()  # the schemas live as long as this reference
