"""Finds linear classifiers in a file: one alone, or all those of a linear evaluation, as DINOv2's leaves them.

A classifier is a weight [n_classes, d_in], with or without a bias, under any name: weight, linear.weight, head.weight,
linear_classifiers.module.classifiers_dict.classifier_4_blocks_avgpool_True_lr_0_00100.linear.weight. Its width says what it was
made for, and so does such a name.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitoats.common.errors import InputError
from vitoats.loading.readings import levels, some

CALLED = re.compile(r"(^|[._])(linear|head|classifiers?|fc|lin|probe)([._]|$)")  # names of heads, not of a backbone's layers
INSIDE = re.compile(r"(^|\.)(blocks|layers?|resblocks|attn|mlp|patch_embed)\.")
DINOV2 = re.compile(r"classifier_(\d+)_blocks_avgpool_(True|False)")
LAYERS = {1: (1, False), 2: (1, True), 4: (4, False), 5: (4, True)}  # of DINOv2's linear evaluation, by the number of tokens


@dataclass(frozen=True)
class Classifier:
    """A linear classifier.

    Attributes:
        name: its name in the file; "" for a weight alone.
        weight: [n_classes, d_in].
        bias: [n_classes]; zeros if the file has none.
    """

    name: str
    weight: Tensor
    bias: Tensor

    def readings(self, width: int) -> list[tuple[int, bool]]:
        """The features that it may take from a backbone of this width: numbers of layers, with or without the patch mean."""
        tokens = self.weight.shape[1] / width
        fitting = [(layers, mean) for layers, mean in ((int(tokens), False), (int(tokens) - 1, True)) if layers >= 1]
        fitting = [kind for kind in fitting if sum(kind) == tokens]
        named = DINOV2.search(self.name)
        return [kind for kind in fitting if named is None or kind == (int(named[1]), named[2] == "True")]


def find_classifiers(path: Path, content: Any) -> list[Classifier]:
    """The classifiers in a file; only those called head, classifier or the like, if there are any.

    Args:
        path: the file, for error messages.
        content: what it holds (``weights.read_content``).

    Raises:
        InputError: there is none, or one is no linear head.
    """
    found = [classifier for place, tensors in levels(content) for classifier in _classifiers(path, place, tensors)]
    called = [one for one in found if not INSIDE.search(one.name + ".") and (not one.name or CALLED.search(one.name))]
    if not found:
        raise InputError(f"{path} holds no linear head (a weight and a bias): give `head` the file of a linear head")
    return called or found


def choose(path: Path, found: list[Classifier], name: str | None, width: int, layers: int | None) -> Classifier:
    """The classifier that is named, or the only one that fits a backbone of this width.

    Raises:
        InputError: there are several of them, or none of that name.
    """
    if name is not None:
        named = [one for one in found if name in (one.name, *one.name.split("."))] or [one for one in found if name in one.name]
        if len(named) == 1:
            return named[0]
        what = "no classifier" if not named else f"{len(named)} classifiers"
        raise InputError(f"{path} holds {what} called {name!r}: give `head_name` one of {some(_short(named or found))}")
    if len(found) == 1:
        return found[0]
    fitting = [one for one in found if any(layers in (None, kind[0]) for kind in one.readings(width))]
    if len(fitting) != 1:
        which = "of which none fits this backbone" if not fitting else f"of which {len(fitting)} fit this backbone"
        raise InputError(
            f"{path} holds {len(found)} classifiers, {which}: give `head_name` one of {some(_short(fitting or found))}"
        )
    return fitting[0]


def features_of(path: Path, classifier: Classifier, width: int, layers: int | None) -> tuple[int, bool]:
    """The number of layers, and whether the patch mean is appended, by the classifier's width.

    Raises:
        InputError: no such features of this backbone are as wide, or two kinds are.
    """
    d_in = classifier.weight.shape[1]
    kinds = [kind for kind in classifier.readings(width) if layers in (None, kind[0])]
    usual = LAYERS.get(d_in // width)
    if layers is None and usual in kinds:
        return usual
    if len(kinds) > 1:
        (many, _), (few, _) = kinds
        raise InputError(
            f"the head {path} takes {d_in} features: the class tokens of {many} layers, or those of {few} and the mean of the "
            f"patches; give `head_layers` {many} or {few}"
        )
    if not kinds:
        given = width * (layers or 1) + width
        raise InputError(
            f"the head {path} takes {d_in} features, but {layers or 1} layer(s) of this backbone give {given}, "
            f"or {given - width} without the patches: use the head of this backbone"
        )
    return kinds[0]


def _classifiers(path: Path, place: str, tensors: Mapping[str, Tensor]) -> list[Classifier]:
    found = []
    for name, weight in tensors.items():
        stem, _, last = name.rpartition(".")
        beside = f"{stem}." if stem else ""
        if last != "weight" or (stem and weight.ndim != 2):
            continue
        bias = tensors.get(f"{beside}bias")
        if weight.ndim != 2 or (bias is not None and bias.shape != weight.shape[:1]):
            shape = "" if bias is None else f" and a bias of shape {list(bias.shape)}"
            held = f"a weight of shape {list(weight.shape)}{shape}"
            raise InputError(f"{path} holds {held}, which are no linear head: give `head` another file")
        parent = _parent(stem)
        if any(key.endswith(".running_mean") and _parent(_parent(key)) == parent for key in tensors):
            raise InputError(f"{path} has a batch norm beside its classifier: fold it into the weights of `head` first")
        bias = torch.zeros(len(weight)) if bias is None else bias
        found.append(Classifier(".".join(filter(None, (place, stem))), weight, bias))
    return found


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _short(classifiers: list[Classifier]) -> list[str]:
    """The part of each name in which they differ."""
    names = [one.name.split(".") for one in classifiers]
    parts = [{name[i] for name in names} for i in range(min(map(len, names)))]
    differing = next((i for i, values in enumerate(parts) if len(values) == len(names)), None)
    return [name[differing] if differing is not None else ".".join(name) for name in names]
