"""Explains weights that do not fit a model: the first names that differ, the arguments or the models that would fit."""

import difflib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import vitoats.common.torchvision_ops  # noqa: F401  (before timm)
from vitoats.common.errors import InputError, one_line
from vitoats.common.sizes import ImageSize
from vitoats.loading.adaptations import PATCHES, POSITIONS, Shapes, patches_of, shapes_of
from vitoats.loading.names import HUB_NAMES
from vitoats.loading.readings import Reading, some
from vitoats.loading.timm_config import allowed_arguments, suits

import timm  # isort: skip

SIZES = {  # words for the width of a vision transformer in timm's names
    192: ("tiny",), 384: ("small",), 512: ("medium", "betwixt"), 768: ("base",), 1024: ("large",), 1152: ("so400m",),
    1280: ("huge",), 1408: ("giant",), 1536: ("giant", "giantopt"), 1664: ("gigantic", "bigG"), 4096: ("7b",),
}  # fmt: skip
CANONICAL = (  # one name for what models and files name differently; an empty one is not compared
    (r"^(register_tokens|storage_tokens)$", "reg_token"), (r"\.gamma_([12])$", r".ls\1.gamma"),
    (r"mlp\.w12\.", "mlp.fc1."), (r"mlp\.w1\.", "mlp.fc1_g."), (r"mlp\.w2\.", "mlp.fc1_x."), (r"mlp\.w3\.", "mlp.fc2."),
    (r"^(mask_token|rope.*|head\..*|pos_embed|.*\.attn\.(qkv\.bias(_mask)?|[qkv]_bias))$", ""),
)  # fmt: skip
MOST = 24  # models that are compared
SHOWN = 3


def check_arguments(name: str, architecture: str, kwargs: Mapping[str, Any]) -> None:
    """Refuses arguments that an architecture does not take.

    Raises:
        InputError: ``model_kwargs`` has such an argument, or such a value.
    """
    if not kwargs:
        return
    if "img_size" in kwargs:
        raise InputError("the image size is an argument of its own: give `img_size`, and leave it out of `model_kwargs`")
    allowed = allowed_arguments(architecture)
    for key, value in kwargs.items():
        if key not in allowed:
            near = ", ".join((difflib.get_close_matches(key, allowed, n=SHOWN) or sorted(allowed))[:9])
            raise InputError(f"{name} does not take the argument {key[:50]!r}: give `model_kwargs` others, such as {near}")
        if value is not None and not suits(value, allowed[key]):
            raise InputError(f"{name} takes no such {key}: give it in `model_kwargs` as a number, a word, or a short list")


def cannot_build(name: str, img_size: ImageSize | None, kwargs: Mapping[str, Any], error: Exception) -> str:
    """The message for a model that timm cannot build, or whose own weights do not fit it."""
    given = {**({} if img_size is None else {"`img_size`": img_size}), **({"`model_kwargs`": dict(kwargs)} if kwargs else {})}
    with_them = f" with {', '.join(f'{key} {value}' for key, value in given.items())}" if given else ""
    differences = _differences(error)
    if differences and not kwargs:
        return f"the weights of {name} do not fit its architecture: {differences}; save the folder again"
    return f"{name} cannot be built{with_them}: {differences or one_line(error)}"


def do_not_fit(
    name: str,
    architecture: str,
    file: Path,
    reading: Reading,
    arguments: Mapping[str, Any],
    model: nn.Module,
    error: Exception,
) -> str:
    """The message for weights that do not fit a model.

    Args:
        name: the model's name.
        architecture: its name in timm, with or without a tag.
        file: the file with the weights.
        reading: the weights.
        arguments: the arguments that the model was built with.
        model: the model; it may be on the meta device.
        error: what timm or torch said.
    """
    differences = _differences(error) or _other_names(reading.shapes, shapes_of(model)) or one_line(error, 200)
    said = f"the weights {file} do not fit {name}: {differences}"
    architecture = architecture.partition(".")[0]
    if name in HUB_NAMES and (others := _hub_names(reading.shapes)):
        return f"{said}; they would fit {' or '.join(others)}"
    kwargs = _arguments(reading.shapes, shapes_of(model))
    if kwargs and _fits(reading.shapes, architecture, {**arguments, **kwargs}):
        return f"{said}; add `model_kwargs` {' '.join(f'{key}={value}' for key, value in kwargs.items())}"
    if (patches := patches_of(reading.shapes, model)) is not None and not _is_square((1, patches, 0)):
        return f"{said}; their {patches} positions are for no square image: give `img_size` as height x width"
    models = _models(reading.shapes, architecture)
    return f"{said}; {'they would fit ' + ' or '.join(models) if models else 'use the model they were made for'}"


def _differences(error: Exception) -> str:
    """What differs, by torch's message; "" for other errors."""
    text = str(error)
    lists = {}
    for what, found in re.findall(r"(Missing|Unexpected) key\(s\) in state_dict: (.*?)\. ?(?=\n|$)", text):
        lists[what.lower()] = re.findall(r'"([^"]+)"', found)
    shapes = re.findall(r"size mismatch for (\S+): .*?shape torch\.Size\((\[.*?\])\).*?torch\.Size\((\[.*?\])\)", text)
    lists["of another shape"] = [f"{name} {theirs} for {ours}" for name, theirs, ours in shapes]
    return "; ".join(f"{what} {some(names)}" for what, names in lists.items() if names)


def _other_names(held: Shapes, own: Shapes) -> str:
    """The names that only a file has, and those that only a model has; "" if they have the same."""
    differing = {"missing": own.keys() - held.keys(), "unexpected": held.keys() - own.keys()}
    return "; ".join(f"{what} {some(sorted(names))}" for what, names in differing.items() if names)


def _arguments(held: Shapes, own: Shapes) -> dict[str, Any]:
    """timm's arguments that the names and shapes of a file stand for, if they are not those of the model."""
    found: dict[str, Any] = {}
    if _depth(held) != _depth(own) and _depth(held):
        found["depth"] = _depth(held)
    if "fc_norm.weight" in held and "fc_norm.weight" not in own:
        found |= {"fc_norm": True} if "norm.weight" in held else {"global_pool": "avg"}
    if "fc_norm.weight" in own and "fc_norm.weight" not in held:
        found["global_pool"] = "token"
    if "blocks.0.ls1.gamma" in held and "blocks.0.ls1.gamma" not in own:
        found["init_values"] = 1e-5
    if "cls_token" in own and "cls_token" not in held:
        found |= {"class_token": False, "global_pool": "avg"}
    if "norm_pre.weight" in held and "norm_pre.weight" not in own:
        found["pre_norm"] = True
    if "blocks.0.attn.q_norm.weight" in held and "blocks.0.attn.q_norm.weight" not in own:
        found["qk_norm"] = True
    if "blocks.0.attn.qkv.bias" in own and "blocks.0.attn.qkv.bias" not in held:
        found["qkv_bias"] = False
    registers = held.get("reg_token", (1, 0, 0))
    if len(registers) == 3 and registers[1] != own.get("reg_token", (1, 0, 0))[1]:
        found["reg_tokens"] = registers[1]
        if "cls_token" in held and _is_square(held.get(POSITIONS, ())):
            found["no_embed_class"] = True
    patch, size = held.get(PATCHES, ()), own.get(PATCHES, ())
    if len(patch) == len(size) == 4 and patch[-1] != size[-1]:
        found["patch_size"] = patch[-1]
    return found


def _depth(shapes: Shapes) -> int:
    """The number of blocks, if they are numbered without gaps; else 0."""
    numbers = {int(found[1]) for name in shapes if (found := re.match(r"blocks\.(\d+)\.", name))}
    return len(numbers) if numbers == set(range(len(numbers))) else 0


def _is_square(positions: tuple[int, ...]) -> bool:
    return len(positions) == 3 and round(positions[1] ** 0.5) ** 2 == positions[1]


def _fits(held: Shapes, architecture: str, arguments: Mapping[str, Any]) -> bool:
    """Whether a model that is built with these arguments has a file's names and shapes, apart from classifier and positions."""
    try:
        with torch.device("meta"):
            model = timm.create_model(architecture, pretrained=False, **arguments)
    except Exception:  # architectures raise various errors on arguments that they do not take
        return False
    return _canonical(shapes_of(model)) == _canonical(held)


def _canonical(shapes: Shapes) -> Shapes:
    found = {}
    for name, shape in shapes.items():
        for pattern, ours in CANONICAL:
            name = re.sub(pattern, ours, name)
        if name:
            found[name] = shape
    return found


def _hub_names(held: Shapes) -> list[str]:
    """The hub-style names of models that have a file's names and shapes, apart from positions."""
    words = SIZES.get(held.get(PATCHES, (0,))[0], ())
    named = {name: row.timm_name.partition(".")[0] for name, row in HUB_NAMES.items()}
    return [name for name, model in named.items() if any(word in model for word in words) and _fits(held, model, {})][:SHOWN]


def _models(held: Shapes, architecture: str) -> list[str]:
    """The names of a few models that have a file's names and shapes, apart from classifier and positions."""
    patch = held.get(PATCHES, (0, 0, 0, 0))
    hub = {named.timm_name.partition(".")[0]: name for name, named in HUB_NAMES.items()}
    found = []
    for name in _alike(architecture, *(patch[i] for i in (0, -1))):
        if _fits(held, name, {}):
            found.append(hub.get(name, name))
            if len(found) == SHOWN:
                break
    return found


def _alike(architecture: str, width: int, patch: int) -> Iterator[str]:
    """Names of models whose width and patch size may be these, those most like the name of an architecture first."""
    names = timm.list_models()
    words = SIZES.get(width, ())
    sized = [name for name in names if any(word in name for word in words) and f"patch{patch}_" in name]
    near = difflib.get_close_matches(architecture, names, n=MOST // 3, cutoff=0.5)
    order = sorted({*sized, *near}, key=lambda name: -difflib.SequenceMatcher(None, architecture, name).ratio())
    yield from order[:MOST]
