"""Finds a model's weights in a file: at which level of its dictionaries, and behind which prefix of the names.

Training scripts put weights below state_dict, model, teacher, ema, ..., and wrap models, so that names begin with module.,
model., backbone., ... Every level and every prefix is a reading of the file. The one whose names and shapes have most in common
with the model's is taken, and what it leaves out is said. Of two that fit alike, averaged weights (EMA, a teacher's) are taken,
as timm does. A classifier may have another name than timm's, and stand beside the backbone.
"""

import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from vitoats.loading.adaptations import PATCHES, Shapes, shapes_of
from vitoats.loading.foreign import FORMATS

log = logging.getLogger("vitoats")

WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")  # at any depth
AVERAGED = re.compile(r"(^|[._])(ema|teacher|momentum|averaged|swa)([._]|$)|_ema|ema_", re.IGNORECASE)
CHUNK = re.compile(r"(?<=blocks\.)\d+\.(?=\d+\.)")  # DINOv2's training shards blocks in chunks: blocks.1.3. is block 3
CLASSIFIER = re.compile(r"(.*\.)?(head|classifier|fc|linear|clf|cls_head|linear_head|logits)\.weight")
BESIDE = re.compile(r"(decoder\w*|dino_head|ibot_head|projector|projection_head|predictor|criterion|loss\w*|n_averaged)(\.|$)")
DEEPEST = 6  # levels of dictionaries, and parts of a prefix
FEW = 3  # names shown


@dataclass(frozen=True)
class Reading:
    """One way to read a file.

    Attributes:
        place: the keys of the dictionary that holds the tensors, joined by dots; "" for the file itself.
        prefix: what was stripped from the beginning of the names.
        state: the tensors, in names that timm's loading of this model takes.
        shapes: their shapes, in the model's own names.
        left_out: names of the other tensors of the dictionary.
        head: weight [n_classes, d] and bias of a classifier on other features than the model's own (``models.heads``).
        kind: the format that the tensors were converted from; "" if they have timm's names.
        wrappers: parts that were stripped from anywhere in the names, in words.
        classifier: the name of the classifier's weight, if the model has another name for it.
    """

    place: str
    prefix: str
    state: dict[str, Tensor]
    shapes: Shapes
    left_out: tuple[str, ...] = ()
    head: tuple[Tensor, Tensor] | None = None
    kind: str = ""
    wrappers: tuple[str, ...] = ()
    classifier: str = ""

    @property
    def where(self) -> str:
        """Place and prefix in words."""
        return " ".join(
            [*([f"under {self.place!r}"] if self.place else []), *([f"behind {self.prefix!r}"] if self.prefix else [])]
        )


def find_weights(source: str, content: Any, model: nn.Module) -> Reading | None:
    """The reading of a file that fits a model best; what was stripped, converted and left out is logged.

    Args:
        source: the file, for log lines.
        content: what the file holds (``weights.read_content``).
        model: the model; it may be on the meta device.

    Returns:
        the reading, whose tensors need not fit the model; None if the file has no tensors by name.
    """
    expected = shapes_of(model)
    held = list(levels(content))
    found = [reading for place, tensors in held for reading in _readings(place, tensors, expected, model)]
    if not found:
        return None
    scores = [_score(reading, expected) for reading in found]
    best = max(range(len(found)), key=lambda i: (*scores[i], bool(AVERAGED.search(found[i].place + "." + found[i].prefix)), -i))
    reading = found[best]
    if 2 * scores[best][1] < min(len(expected), len(reading.shapes)):  # names that timm may know, but we do not
        return _as_timm(dict(held), reading)
    alike = [other for i, other in enumerate(found) if i != best and scores[i] == scores[best] and other.where != reading.where]
    _say(source, reading, alike)
    return reading


def count_tensors(content: Any) -> int:
    """The number of tensors by name."""
    return sum(len(tensors) for _, tensors in levels(content))


def levels(content: Any, place: tuple[str, ...] = (), seen: set[int] | None = None) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Every dictionary with tensors by name, with its place; each once."""
    seen = set() if seen is None else seen
    if isinstance(content, (list, tuple)):
        content = {str(i): value for i, value in enumerate(content) if isinstance(value, (Mapping, list, tuple))}
    if not isinstance(content, Mapping) or id(content) in seen or len(place) > DEEPEST:
        return
    seen.add(id(content))
    tensors = {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if tensors:
        yield ".".join(place), tensors
    for key, value in content.items():
        if isinstance(key, str):
            yield from levels(value, (*place, key), seen)


def _readings(place: str, tensors: dict[str, Tensor], expected: Shapes, model: nn.Module) -> Iterator[Reading]:
    """The readings of one dictionary: the best prefixes for the model's own names, and for each foreign format."""
    chunked = any(CHUNK.search(name) for name in tensors) and not any(CHUNK.search(name) for name in expected)
    cleaned = {_without_wrappers(name, expected, chunked): tensor for name, tensor in tensors.items()}
    if len(cleaned) < len(tensors):
        cleaned, chunked = tensors, False
    wrappers = tuple(part for part in WRAPPERS if any(part in name.split(".") for name in tensors.keys() - cleaned.keys()))
    wrappers = (*map(repr, wrappers), *(["the numbers of chunks"] if chunked else []))
    for prefix in {"": 0} | dict(_prefixes(cleaned, expected).most_common(DEEPEST)):
        state = {name[len(prefix) :]: tensor for name, tensor in cleaned.items() if name.startswith(prefix)}
        extra = [name for name in state if BESIDE.match(name) and name not in expected]
        left_out = [*(name for name in cleaned if not name.startswith(prefix)), *extra]
        state = {name: tensor for name, tensor in state.items() if name not in extra}
        reading = Reading(place, prefix, state, _shapes(state), tuple(left_out), wrappers=wrappers)
        yield _with_classifier(reading, cleaned, expected, model)
    for form in FORMATS:
        for prefix in form.prefixes(cleaned):
            inside = {name[len(prefix) :]: tensor for name, tensor in cleaned.items() if name.startswith(prefix)}
            others = {name: tensor for name, tensor in cleaned.items() if not name.startswith(prefix)}
            made = form.convert(inside, others, model)
            if made is not None:
                yield Reading(place, prefix, made.state, made.shapes, tuple(made.left_out), made.head, form.name, wrappers)


def _without_wrappers(name: str, expected: Shapes, chunked: bool) -> str:
    if name in expected:
        return name
    name = ".".join(part for part in name.split(".") if part not in WRAPPERS)
    return CHUNK.sub("", name, count=1) if chunked else name


def _with_classifier(reading: Reading, tensors: dict[str, Tensor], expected: Shapes, model: Any) -> Reading:
    """The reading with the only classifier on the model's features, if that has another name than the model's own."""
    ours = getattr(model, "pretrained_cfg", {}).get("classifier") or "head"
    if not isinstance(ours, str) or f"{ours}.weight" in reading.state or PATCHES not in reading.state:
        return reading
    width = expected.get(f"{ours}.weight", (0, model.num_features))[-1]
    called = [name for name in tensors if CLASSIFIER.fullmatch(name) and name.removeprefix(reading.prefix) not in expected]
    if len(called) != 1 or tensors[called[0]].ndim != 2 or tensors[called[0]].shape[1] != width:
        return reading
    stem = called[0].removesuffix("weight")
    taken = {name for name in (f"{stem}weight", f"{stem}bias") if name in tensors}
    state = {name: tensor for name, tensor in reading.state.items() if reading.prefix + name not in taken}
    state |= {f"{ours}.bias": torch.zeros(len(tensors[called[0]]))}
    state |= {f"{ours}.{name.removeprefix(stem)}": tensors[name] for name in taken}
    left_out = tuple(name for name in reading.left_out if name not in taken)
    return replace(reading, state=state, shapes=_shapes(state), left_out=left_out, classifier=called[0])


def _prefixes(tensors: Mapping[str, Tensor], expected: Shapes) -> Counter[str]:
    """How many of the model's names stand behind each prefix."""
    found: Counter[str] = Counter()
    for name in tensors:
        parts = name.split(".", DEEPEST + 1)
        for i in range(1, min(len(parts), DEEPEST + 1)):
            if ".".join(parts[i:]) in expected:
                found[".".join(parts[:i]) + "."] += 1
    return found


def _score(reading: Reading, expected: Shapes) -> tuple[int, int]:
    """How many tensors have the shape, and the name, of one of the model's."""
    return (
        sum(expected.get(name) == shape for name, shape in reading.shapes.items()),
        sum(name in expected for name in reading.shapes),
    )


def _as_timm(held: dict[str, dict[str, Tensor]], other: Reading) -> Reading:
    """The dictionary that timm would read, for timm to convert."""
    place = next((key for key in ("state_dict_ema", "model_ema", "state_dict", "model", "") if key in held), other.place)
    state = {re.sub(r"^(module\.)?(_orig_mod\.)?", "", name): tensor for name, tensor in held[place].items()}
    return Reading(place, "", state, _shapes(state))


def _say(source: str, reading: Reading, alike: list[Reading]) -> None:
    said = [f"are {reading.where}"] if reading.where else []
    if reading.wrappers:
        said.append(f"lose {' and '.join(reading.wrappers)} in their names")
    if reading.classifier:
        said.append(f"have {reading.classifier} as their classifier")
    if reading.kind:
        said.append(f"are converted from {reading.kind}")
    if reading.left_out:
        said.append(f"leave out {some(reading.left_out)}")
    if said:
        others = f" ({alike[0].where or 'the top level'} would fit as well)" if alike else ""
        log.info("the weights of %s %s%s", source, ", ".join(said), others)


def some(names: Any) -> str:
    """The first few of several names, and how many there are."""
    names = [name if len(name) <= 60 else name[:60] + "..." for name in names]
    more = f" and {len(names) - FEW} more" if len(names) > FEW else ""
    return ", ".join(names[:FEW]) + more


def _shapes(state: Mapping[str, Tensor]) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}
