"""A system that refuses AMX, as some containers do: the next best kernels run, with the same results up to rounding."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from tests.runtime.int8_models import attention_model, int8_model, random_case
from vitoats.runtime import library, session

ROOT = Path(__file__).parent.parent.parent
pytestmark = pytest.mark.skipif(
    platform.system() != "Linux" or platform.machine() != "x86_64" or "amx" not in library.available_isas(),
    reason="this machine has no AMX that could be refused",
)

# The filter answers arch_prctl(ARCH_REQ_XCOMP_PERM, ...) with EPERM and lets all else pass.
REFUSE = """
import ctypes, struct

LOAD, EQUAL, RETURN = 0x20, 0x15, 0x06
NUMBER, ARGUMENT = 0, 16
ARCH_PRCTL, REQUEST_PERMISSION = 158, 0x1023
ALLOW, EPERM = 0x7FFF0000, 0x00050001
program = b"".join(
    struct.pack("HBBI", *step)
    for step in (
        (LOAD, 0, 0, NUMBER),
        (EQUAL, 0, 3, ARCH_PRCTL),
        (LOAD, 0, 0, ARGUMENT),
        (EQUAL, 0, 1, REQUEST_PERMISSION),
        (RETURN, 0, 0, EPERM),
        (RETURN, 0, 0, ALLOW),
    )
)
steps = ctypes.create_string_buffer(program, len(program))
described = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(steps))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
assert libc.prctl(22, 2, ctypes.create_string_buffer(described, len(described))) == 0, ctypes.get_errno()  # PR_SET_SECCOMP
assert libc.syscall(ARCH_PRCTL, REQUEST_PERMISSION, 18) == -1
"""
RUN = """
import json, sys
import numpy as np
from vitoats.runtime import library, session

for name in sys.argv[2:]:
    inputs = dict(np.load(f"{sys.argv[1]}/{name}.npz"))
    np.save(f"{sys.argv[1]}/{name}.npy", session(f"{sys.argv[1]}/{name}.onnx").run(None, inputs)[0])
print(json.dumps([library.isa(), library.available_isas()]))
"""


def in_a_process_without_amx(code: str, *argv: object, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", REFUSE + code, *map(str, argv)]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=300)


def test_the_next_best_kernels_run(tmp_path):
    random = np.random.default_rng(0)
    cases = {name: random_case(random, name, 96, 200, 0.5, 3, 20) for name in ("SparseMatMulInt8", "LayerNormMatMulInt8Gelu")}
    models = {name: int8_model(case) for name, case in cases.items()} | {"attention": attention_model(3, 64, 0.125, bfloat16=1)}
    inputs = {name: {"x": random.standard_normal((2, 70, 200), np.float32)} for name in cases}
    inputs["attention"] = {"qkv": random.standard_normal((2, 70, 9 * 64), np.float32)}
    expected = {}
    for name, model in models.items():
        onnx.save(model, tmp_path / f"{name}.onnx")
        np.savez(tmp_path / f"{name}.npz", **inputs[name])
        expected[name] = session(tmp_path / f"{name}.onnx").run(None, inputs[name])[0]
    done = in_a_process_without_amx(RUN, tmp_path, *models)
    assert done.returncode == 0, done.stderr
    isas = [name for name in library.available_isas() if name != "amx"]
    assert json.loads(done.stdout) == ["avx512_vnni", isas]
    for name in models:
        found = np.load(tmp_path / f"{name}.npy")
        tolerance = 2e-2 if name == "attention" else 1e-5  # AMX rounds to bfloat16
        assert np.abs(found - expected[name]).max() <= tolerance * np.abs(expected[name]).max(), name


def test_asking_for_amx_by_name_is_refused():
    done = in_a_process_without_amx(
        "from vitoats.runtime import library\nimport onnxruntime\nlibrary.register(onnxruntime.SessionOptions())",
        **{library.ISA_VARIABLE: "amx"},
    )
    assert done.returncode == 1
    assert (
        "VITOATS_ISA=amx names no instruction set of this processor: unset it, or set it to one of avx512_vnni," in done.stderr
    )
