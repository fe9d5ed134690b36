"""A program that opens an ONNX file, runs it three times, and prints the resident memory of the process in bytes (Linux).

python -m vitoats.benchmark.resident FILE THREADS SHAPE     (SHAPE as JSON: [1, 3, 224, 224])

It imports only what a deployed process would: numpy and ONNX Runtime.
"""

import json
import sys
from pathlib import Path

import numpy as np

from vitoats.runtime import session


def resident_bytes() -> int:
    """Resident memory of this process."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(status["VmRSS"].split()[0]) * 1024


if __name__ == "__main__":
    opened = session(sys.argv[1], int(sys.argv[2]))
    batch = np.zeros(json.loads(sys.argv[3]), np.float32)
    for _ in range(3):
        opened.run(None, {opened.get_inputs()[0].name: batch})
    print(resident_bytes())
