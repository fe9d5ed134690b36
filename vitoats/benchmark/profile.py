"""Where the time of an exported file goes, by kind of node, from the profile that ONNX Runtime writes."""

import json
import statistics
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vitoats.format.operator import DOMAIN, LINEAR, QKV_ATTENTION
from vitoats.runtime.inference import image_shape, session

RUNS, WARM_UPS = 12, 2
OWN = {*LINEAR, QKV_ATTENTION.name}  # operators of the native library
PRODUCTS = ("MatMul", "Gemm")  # parts of the names of ONNX Runtime's products, such as FusedMatMul or DynamicQuantizeMatMul


@dataclass(frozen=True)
class NodeTimes:
    """All nodes of one kind.

    Attributes:
        kind: the operator; those of the native library with their domain. A product of two activations is kept apart from
            one with weights, which is a linear layer.
        linear: whether these are linear layers.
        nodes: number of nodes.
        ms: milliseconds of one run in all of them, the sum of each node's median.
        share: of the time in all nodes, in percent.
    """

    kind: str
    linear: bool
    nodes: int
    ms: float
    share: float


def profile(file: Path, batch: int, threads: int) -> list[NodeTimes]:
    """Runs a file on noise images, with ONNX Runtime's profile switched on, which itself takes a little time for each node.

    Args:
        file: an ONNX file with one input [b, ...].
        batch: batch size.
        threads: CPU threads; 0 for all cores.

    Returns:
        a row for each kind of node, the slowest first.

    Raises:
        InputError: the file is missing or does not run.
    """
    with tempfile.TemporaryDirectory(prefix="vitoats-profile-") as scratch:
        opened = session(file, threads, profile_to=Path(scratch) / "profile")
        source = opened.get_inputs()[0]
        images = np.random.default_rng(0).standard_normal((batch, *image_shape(opened)), np.float32)
        for _ in range(WARM_UPS + RUNS):
            opened.run(None, {source.name: images})
        return summarise(json.loads(Path(opened.end_profiling()).read_text()))


def summarise(events: Iterable[dict[str, Any]]) -> list[NodeTimes]:
    """The events of a profile, by kind of node."""
    times: dict[tuple[str, bool, str], list[float]] = {}  # microseconds of each run, by kind and node
    for event in events:
        if event["cat"] == "Node" and event["name"].endswith("_kernel_time"):
            node = event["args"]["node_index"] + event["name"]
            times.setdefault((*_kind(event["args"]), node), []).append(event["dur"])
    found: dict[tuple[str, bool], list[float]] = {}
    for (kind, linear, _), of_runs in times.items():
        found.setdefault((kind, linear), []).append(statistics.median(of_runs[WARM_UPS:]) / 1000)
    total = sum(map(sum, found.values()))
    rows = [
        NodeTimes(kind, linear, len(ms), round(sum(ms), 4), round(100 * sum(ms) / total, 2))
        for (kind, linear), ms in found.items()
    ]
    return sorted(rows, key=lambda row: -row.ms)


def _kind(args: dict[str, Any]) -> tuple[str, bool]:
    """The kind of a node, and whether it is a linear layer."""
    name = args["op_name"]
    if name in OWN:
        return f"{DOMAIN}::{name}", name in LINEAR
    if not any(product in name for product in PRODUCTS):
        return name, False
    linear = int(args["parameter_size"]) > 0 or len(args["input_type_shape"]) == 1  # packed weights are no longer an input
    return (name if linear else f"{name} (activations only)"), linear
