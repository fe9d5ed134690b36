"""What differs between the results of a run and of its repetition: bytes, and where these differ, weights and figures."""

import csv
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import safetensors.torch
import torch
from onnx import numpy_helper

from vitoats.common.errors import one_line
from vitoats.common.json_files import parse_json
from vitoats.common.manifest import Manifest, output_digests
from vitoats.format import factored
from vitoats.loading.checkpoint import is_checkpoint, read_about

TIMES = r"(.*_)?seconds|.*_per_sec(ond)?|(latency_)?ms(_\w+)?|speedup(_\w+)?"
OF_A_RUN = re.compile(rf"{TIMES}|measured_on|output|head|sha256")  # keys that differ without meaning
TABLES = (".json", ".jsonl", ".csv")
NAMED = 3  # figures that a line names


@dataclass
class Differences:
    """What differs.

    Attributes:
        equal: the files of the result; for each, whether its bytes are equal.
        words: what is known of those that differ, by name.
        relative: the relative difference of weights ||W' - W|| / ||W|| in the Frobenius norm, by file.
    """

    equal: dict[str, bool] = field(default_factory=dict)
    words: dict[str, str] = field(default_factory=dict)
    relative: dict[str, float] = field(default_factory=dict)

    def lines(self) -> Iterator[str]:
        """The differences, for people."""
        if self.equal and all(self.equal.values()):
            yield f"the same bytes in all files: {len(self.equal)}"
        elif self.equal:
            yield f"the same bytes in {sum(self.equal.values())} of {len(self.equal)} files"
        elif not self.words:
            yield "the same figures"
        for name, words in self.words.items():
            yield f"{name}: {words}"

    def to_dict(self) -> dict[str, Any]:
        """The differences, for JSON."""
        return {
            "equal": all(self.equal.values()) and not self.words,
            "files": len(self.equal),
            "files_equal": sum(self.equal.values()),
            "relative_difference": max(self.relative.values(), default=0.0),
            "differences": self.words,
        }


def differences(first: Manifest, result: Mapping[str, Any], old: Path, new: Path) -> Differences:
    """Compares a run with its repetition.

    Args:
        first: the manifest of the run.
        result: the JSON line of the repetition, which is compared where the run wrote no files but that.
        old: the folder or file that the run wrote.
        new: that of the repetition.
    """
    found = Differences()
    if not first.outputs:
        if words := _figures(first.result, result):
            found.words["figures"] = words
        return found
    now = output_digests(new)
    names = {name if new.is_dir() else name.replace(new.name, old.name, 1): name for name in now}
    now = {name: now[its_name] for name, its_name in names.items()}
    before = output_digests(old)
    for name in sorted({*first.outputs, *now}):
        found.equal[name] = first.outputs.get(name) == now.get(name)
        if found.equal[name]:
            continue
        if name not in first.outputs or name not in now:
            found.words[name] = "only in the first result" if name in first.outputs else "only in the repetition"
        elif before.get(name) != first.outputs[name]:
            found.words[name] = "other bytes; how far off is unknown, for the first file was changed after its run"
        else:
            pair = (old / name, new / name) if new.is_dir() else (old.with_name(name), new.with_name(names[name]))
            try:
                found.words[name] = _described(*pair, found.relative, name)
            except Exception as error:  # readers raise various errors on damaged files
                found.words[name] = f"other bytes, which cannot be compared ({one_line(error, 100)})"
    return found


def _described(old: Path, new: Path, relative: dict[str, float], name: str) -> str:
    if old.suffix in TABLES:
        return _figures(_table(old), _table(new)) or "the same figures, but for times and paths"
    before, now = _tensors(old), _tensors(new)
    if before is None or now is None:
        return "other bytes"
    difference = relative_difference(before, now)
    if difference is None:
        return "tensors of other names or shapes"
    relative[name] = difference
    return f"relative difference of the weights {difference:.1e}"


def relative_difference(old: Mapping[str, np.ndarray], new: Mapping[str, np.ndarray]) -> float | None:
    """||W' - W|| / ||W|| over all tensors; None if they have other names or shapes."""
    if {name: x.shape for name, x in old.items()} != {name: x.shape for name, x in new.items()}:
        return None
    norm, change = 0.0, 0.0
    for name, x in old.items():
        norm += float(np.square(x, dtype=np.float64).sum())
        change += float(np.square(new[name].astype(np.float64) - x).sum())
    return (change / norm) ** 0.5 if norm else float(change > 0)


def _tensors(path: Path) -> dict[str, np.ndarray] | None:
    """The tensors of a file, in which compressed layers have become dense; None for a file of another kind."""
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)
    if path.suffix == ".onnx":
        return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(str(path)).graph.initializer}
    if path.suffix != ".safetensors":
        return None
    state = safetensors.torch.load_file(path)
    if is_checkpoint(path.parent):
        state = _dense(state, read_about(path.parent)["row_blocks"])
    return {name: (x.float() if x.dtype == torch.bfloat16 else x).numpy() for name, x in state.items()}


def _dense(state: Mapping[str, torch.Tensor], parts: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of a compressed folder's file, with the dense weights of its compressed layers: supports may differ."""
    here = {name: pairs for name, pairs in parts.items() if f"{name}.S.mask" in state}
    for key in state:
        if key.endswith(factored.SCALE):
            here[key.removesuffix(factored.SCALE)] = [(len(state[key]), 0)]
    found = {key: x for key, x in state.items() if not key.startswith(tuple(f"{name}." for name in here))}
    for name, pairs in here.items():
        d_in = state[f"{name}.weight" if f"{name}.weight" in state else f"{name}.V.0"].shape[1]
        layer = factored.unpack(name, state, [(rows, rank) for rows, rank in pairs], d_in).float()
        found[f"{name}.weight"] = layer.weight.detach()
        found |= {} if layer.bias is None else {f"{name}.bias": layer.bias.detach()}
    return found


def _table(path: Path) -> Any:
    """The content of a file of figures."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".csv":
        return list(csv.DictReader(text.splitlines()))
    return [parse_json(line) for line in text.splitlines()] if path.suffix == ".jsonl" else parse_json(text)


def _figures(old: Any, new: Any) -> str:
    """Which figures differ, in words; "" if none does. Times and paths are left out."""
    before, now = dict(_flat(old)), dict(_flat(new))
    changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    named = [f"{name} {_short(before.get(name))} -> {_short(now.get(name))}" for name in changed[:NAMED]]
    return ", ".join(named) + (f" and {len(changed) - NAMED} more" if len(changed) > NAMED else "")


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values of all figures in plain values."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if not OF_A_RUN.fullmatch(str(key)):
                yield from _flat(inner, f"{name}.{key}".lstrip("."))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from _flat(inner, f"{name}[{i}]")
    else:
        yield name, value


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "..."
