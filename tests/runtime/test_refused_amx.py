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

REFUSE = "from vitoats.common.amx import refuse_amx\nrefuse_amx()\n"
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
