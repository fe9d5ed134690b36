"""A program that opens a file, runs it three times, and prints the resident memory of the process in bytes (Linux).

python -m vitoats.benchmark.resident FILE THREADS SHAPE [PRECISION]     (SHAPE as JSON: [1, 3, 224, 224])

With a precision, f32 or bf16, OpenVINO runs the file, otherwise ONNX Runtime. The program imports only what a deployed process
would: numpy and the runtime.
"""

import json
import sys
from pathlib import Path

import numpy as np

from vitoats.benchmark import openvino_files
from vitoats.runtime import session
from vitoats.runtime.inference import inference


def resident_bytes() -> int:
    """Resident memory of this process."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(status["VmRSS"].split()[0]) * 1024


if __name__ == "__main__":
    name, threads, shape, *precision = sys.argv[1:]
    batch = np.zeros(json.loads(shape), np.float32)
    if precision:
        call = openvino_files.open_file(Path(name), precision[0], int(threads), batch)
    else:
        call = inference(session(name, int(threads)), batch)
    for _ in range(3):
        call()
    print(resident_bytes())
