"""Memory of the native library: bounded by the file's constants when a session opens, by a constant when it runs.

Each case runs in a process of its own, whose peak is then that of the case.
"""

import json
import subprocess
import sys

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from vitoats.format.operator import DOMAIN, INPUTS, NAME, OPSET
from vitoats.runtime import library

MB = 10**6
ONNX_RUNTIME = 15 * MB  # its own for the first session, whatever the file
SCRATCH = 16 * 2**20

PROGRAM = """
import json, sys
import numpy as np
import onnxruntime as ort

def status(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))

def forget_peak():
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")

path, library, tokens, k = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
options = ort.SessionOptions()
options.intra_op_num_threads = 1
options.enable_cpu_mem_arena = False
options.register_custom_ops_library(library)
x = np.ones((1, tokens, k), np.float32)
forget_peak()
before = status("VmRSS")
session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
found = {"open": status("VmHWM") - before}
if tokens:
    forget_peak()
    opened = status("VmRSS")
    y = session.run(None, {"x": x})[0]
    found |= {"run": status("VmHWM") - opened - y.nbytes, "least": float(y.min()), "most": float(y.max())}
    del y
    del session
    found["left"] = status("VmRSS") - before
print(json.dumps(found))
"""


def write_model(path, n: int, k: int, parts: int, rank: int, S_ones: bool, value_type: type) -> int:
    """A file whose S is all ones or all zeros, and U and V all ones; returns the bytes of its constants."""
    row = np.packbits(np.full(k, S_ones), bitorder="little")
    constants = [
        numpy_helper.from_array(np.ones(n * k * S_ones, value_type), "values"),
        numpy_helper.from_array(np.tile(row, (n, 1)), "mask"),
        numpy_helper.from_array(np.ones((parts, n // parts, rank), value_type), "U"),
        numpy_helper.from_array(np.ones((parts, rank, k), value_type), "V"),
    ]
    inputs = [*INPUTS[:3], "", *INPUTS[4:]]
    node = helper.make_node(NAME, inputs, ["y"], name="layer", domain=DOMAIN, in_features=k)
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["b", "t", size]) for name, size in (("x", k), ("y", n)))
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
    graph = helper.make_graph([node], "operator", [x], [y], constants)
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), path)
    return sum(len(tensor.raw_data) for tensor in constants)


def measure(path, tokens: int, k: int) -> dict[str, float]:
    argv = [sys.executable, "-c", PROGRAM, str(path), str(library.library_path()), str(tokens), str(k)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("n", "k", "parts", "rank", "S_ones", "value_type"),
    [
        # as many parts as rows: a full mask for U would take 4.5 GB
        (190_000, 1, 190_000, 1, False, np.float16),
        # tall and wide, S empty or full, low-rank or not
        (2_000_000, 1, 1, 0, False, np.float32),
        (2_000_000, 1, 1, 0, True, np.float32),
        (1, 20_000_000, 1, 0, False, np.float32),
        (1, 5_000_000, 1, 1, True, np.float16),
        (3, 1_000_000, 3, 2, False, np.float32),
        # rank 0 of many parts, and a rank far above both dimensions
        (1_000_000, 1, 1_000_000, 0, False, np.float32),
        (1, 1, 1, 1_000_000, False, np.float32),
        (2_000, 500, 2_000, 8, True, np.float16),
    ],
)
def test_a_session_takes_a_small_multiple_of_its_constants(tmp_path, n, k, parts, rank, S_ones, value_type):
    """ONNX Runtime holds them twice while it loads; the library copies S, with 17 bytes for each row."""
    size = write_model(tmp_path / "model.onnx", n, k, parts, rank, S_ones, value_type)
    assert measure(tmp_path / "model.onnx", 0, k)["open"] <= 5 * size + 17 * n + ONNX_RUNTIME


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("n", "k", "parts", "rank", "tokens"),
    [
        (8, 512, 1, 0, 40_000),  # 82 MB of activations
        (16, 64, 1, 500, 20_000),  # 45 MB of activations and z
        (4, 512, 1, 2, 8),
        (100_000, 1, 100_000, 1, 40),  # z of a vector of tokens is 6.4 MB
        (1, 1, 1, 400_000, 17),  # z of a vector of tokens is 25.6 MB
    ],
)
def test_a_run_takes_bounded_memory_and_gives_it_back(tmp_path, n, k, parts, rank, tokens):
    write_model(tmp_path / "model.onnx", n, k, parts, rank, True, np.float32)
    found = measure(tmp_path / "model.onnx", tokens, k)
    one_vector = 16 * 4 * (k + parts * rank)
    assert found["run"] <= max(SCRATCH, one_vector) + 3 * MB
    assert found["left"] <= ONNX_RUNTIME
    assert found["least"] == found["most"] == k * (1 + rank)
