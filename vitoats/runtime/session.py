"""An ONNX file as a session of ONNX Runtime on the CPU, with what vitoats wrote into its metadata."""

import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from vitoats.errors import InputError

METADATA_KEY = "vitoats"


def session(path: str | Path, threads: int = 0) -> ort.InferenceSession:
    """Opens an ONNX file.

    Args:
        path: the file.
        threads: for one inference; 0 takes all cores.

    Raises:
        InputError: no such file, or ONNX Runtime cannot run it.
    """
    if not Path(path).is_file():
        raise InputError(f"there is no ONNX file {path}: write one with tools/export_onnx.py")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors share no public base class
        raise InputError(f"{path} does not run in ONNX Runtime ({str(error).splitlines()[0]}): export it again") from None


def metadata(opened: ort.InferenceSession) -> dict[str, Any]:
    """What vitoats wrote about the model: preprocessing, class count, compression, versions; empty for other files."""
    return json.loads(opened.get_modelmeta().custom_metadata_map.get(METADATA_KEY, "{}"))


def median_latency_ms(
    sessions: Sequence[ort.InferenceSession], batch: np.ndarray, runs: int = 50, warm_up: int = 5
) -> list[float]:
    """Median milliseconds of one inference on a batch [b, 3, h, w], for each session.

    The sessions take turns, so that whatever else the machine does hits them alike.
    """
    times: list[list[float]] = [[] for _ in sessions]
    for _ in range(warm_up + runs):
        for opened, row in zip(sessions, times, strict=True):
            start = time.perf_counter()
            opened.run(None, {opened.get_inputs()[0].name: batch})
            row.append(time.perf_counter() - start)
    return [1000 * statistics.median(row[warm_up:]) for row in times]
