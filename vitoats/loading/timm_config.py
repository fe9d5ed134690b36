"""Reads timm's config.json from a folder or the Hub as untrusted data: only the entries allowed here are passed to timm.

timm itself would accept more: ``model_args`` may name a URL, repository or file to load weights from, and where to write them.
Here they may only hold plain values for arguments of the architecture's own classes. Weights come from the file beside
config.json.
"""

import dataclasses
import functools
import inspect
import math
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import vitoats.common.torchvision_ops  # noqa: F401  (before timm)
from vitoats.common.errors import InputError, one_line
from vitoats.common.json_files import read_json
from vitoats.data.transforms import MAX_IMG_SIZE

import timm  # isort: skip
from timm.models._builder import build_model_with_cfg  # isort: skip
from timm.models._hub import load_model_config_from_path  # isort: skip

CONFIG = "config.json"

SIZES = ("input_size", "test_input_size", "min_input_size")
KEPT = (  # keys of pretrained_cfg that describe the images, the classifier and the model, but not the source of weights
    *SIZES, "fixed_input_size", "interpolation", "crop_pct", "test_crop_pct", "crop_mode", "mean", "std",
    "num_classes", "label_offset", "label_names", "label_descriptions", "pool_size", "test_pool_size", "first_conv",
    "classifier", "tag", "license", "description", "origin_url", "paper_name", "paper_ids", "notes",
)  # fmt: skip
ANY_SHAPE = ("label_names", "label_descriptions", "license", "description", "origin_url", "paper_name", "paper_ids", "notes")

# arguments of timm's factory, and those that control a model's device and type: not arguments of the architecture
FACTORY = (
    *inspect.signature(timm.create_model).parameters, *inspect.signature(build_model_with_cfg).parameters,
    "self", "args", "cfg", "device", "dtype",
)  # fmt: skip

OF_EVERY_MODEL = ("num_classes", "in_chans", "global_pool")  # timm always writes them, for every model

LARGEST_NUMBER = 2**16  # of an argument; widths and depths are far smaller, the largest class counts about as large
LONGEST = 64  # length of strings and lists
DEPTH = 2  # of lists in each other
TEXT = r"[\w.+-]*"  # names of activations, norms and poolings


@dataclass(frozen=True)
class TimmConfig:
    """The accepted content of a config.json.

    Attributes:
        path: path of the file.
        architecture: an architecture that the installed timm has.
        pretrained_cfg: preprocessing, classifier and description, without sources of weights.
        model_args: arguments of the architecture's entry point.
        img_size: the usual image size in pixels, if the weights were made for another one.
        pos_resample: how positions are resized for it (``vitoats.models.positions``); None for timm's way.
    """

    path: Path
    architecture: str
    pretrained_cfg: dict[str, Any]
    model_args: dict[str, Any]
    img_size: int | None = None
    pos_resample: str | None = None


def read_config(folder: Path) -> TimmConfig:
    """Reads and checks a folder's config.json.

    Raises:
        InputError: the file is not a timm configuration, names an architecture that the installed timm lacks, or has
            arguments that the architecture does not take.
    """
    path = folder / CONFIG
    read_json(path)
    try:
        said, architecture, arguments = load_model_config_from_path(folder)
        pretrained_cfg = {key: said[key] for key in KEPT if said.get(key) is not None}
        arguments = {key: value for key, value in (arguments or {}).items() if value is not None}
    except (ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
        raise InputError(
            f"{path} is no timm configuration ({one_line(error, 100)}): give local-dir: a folder that timm saved"
        ) from None
    if not isinstance(architecture, str) or not re.fullmatch(r"\w+", architecture) or not timm.is_model(architecture):
        named = repr(str(architecture)[:100])
        raise InputError(f"{path} names the architecture {named}, which this timm does not have: update timm")
    allowed = allowed_arguments(architecture)
    for key, value in arguments.items():
        if key not in allowed:
            raise InputError(f"{path} gives {architecture} the argument {key[:50]!r}, which it does not take: remove it there")
        if not suits(value, allowed[key]):
            raise InputError(f"{path} gives {key} a value that no model takes: correct it there")
    for key, value in pretrained_cfg.items():
        if key not in ANY_SHAPE and not is_plain(value):
            raise InputError(f"{path} gives {key} a value that no model takes: correct it there")
    for size in (arguments.get("img_size"), *(pretrained_cfg.get(key) for key in SIZES)):
        lengths = size if isinstance(size, list | tuple) else [size]
        if size is not None and not all(type(n) is int and 1 <= n <= MAX_IMG_SIZE for n in lengths):
            raise InputError(f"{path} has images of {size} px: sizes go from 1 to {MAX_IMG_SIZE}")
    return TimmConfig(path, architecture, pretrained_cfg, arguments)


@functools.cache
def allowed_arguments(architecture: str) -> Mapping[str, Any]:
    """The arguments that config.json may set, with their defaults, which are None where there are none.

    They are constructor parameters of the model's classes, or fields of their ``cfg``.
    """
    with torch.device("meta"):
        model = timm.create_model(architecture)
    found: dict[str, Any] = dict.fromkeys(OF_EVERY_MODEL)
    for kind in type(model).__mro__[: type(model).__mro__.index(nn.Module)]:
        constructor = vars(kind).get("__init__")
        if constructor is not None:
            parameters = inspect.signature(constructor).parameters.values()
            found |= {p.name: None if p.default is p.empty else p.default for p in parameters}
            for hint in typing.get_type_hints(constructor).values():
                for one in filter(dataclasses.is_dataclass, (hint, *typing.get_args(hint))):
                    found |= dict.fromkeys(field.name for field in dataclasses.fields(one))
    return {name: default for name, default in found.items() if name not in FACTORY}


def suits(value: Any, default: Any) -> bool:
    """Whether a value is plain, and no boolean where the default is a whole number, which timm would take for 0 or 1."""
    return is_plain(value) and not (isinstance(value, bool) and type(default) is int)


def is_plain(value: Any, depth: int = DEPTH) -> bool:
    """Whether a value is a number, a boolean, a short string, or a short list of these.

    A whole number may be negative in lists only: the models that take negative ones count blocks from the end.
    """
    if isinstance(value, str):
        return len(value) <= LONGEST and re.fullmatch(TEXT, value) is not None
    if isinstance(value, bool):
        return True
    if isinstance(value, int):
        return (0 if depth == DEPTH else -LONGEST) <= value <= LARGEST_NUMBER
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, list | tuple):
        return depth > 0 and len(value) <= LONGEST and all(item is None or is_plain(item, depth - 1) for item in value)
    return False
