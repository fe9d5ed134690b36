"""The native library under sanitizers, on another processor by emulation, in an old ONNX Runtime, and on mutated models.

Sanitizers do not see what tile instructions read and write, so AMX is plain C++ there, also on processors without it.
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import onnx
import pytest

from tests.runtime.sparse_models import operator_model, random_low_rank, random_sparse
from vitoats.runtime import library

ROOT = Path(__file__).parent.parent.parent
SOURCES = ROOT / "vitoats" / "runtime" / "csrc"
ARM_COMPILER, ARM_EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
ISAS = library.available_isas()
SANITIZED_ISAS = ["amx"] * (ISAS[0] == "avx512_vnni") + ISAS
OLDEST = ("onnxruntime==1.17.3", "numpy<2")
pytestmark = pytest.mark.slow
shares_a_build = pytest.mark.xdist_group("sanitized")  # in one process


def run(*argv, **kwargs) -> str:
    done = subprocess.run([str(a) for a in argv], capture_output=True, text=True, timeout=1200, **kwargs)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def build(folder: Path, *options: str) -> Path:
    cmake = shutil.which("cmake", path=f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}")
    run(cmake, "-S", SOURCES, "-B", folder, *options)
    targets = ("vitoats_ops", "check_kernels", "check_int8", "check_attention")
    run(cmake, "--build", folder, "--target", *targets, "--parallel", "2")
    return folder


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    options = ("-DVITOATS_SANITIZE=ON", "-DVITOATS_EMULATE_AMX=ON", "-DCMAKE_BUILD_TYPE=Debug")
    return build(tmp_path_factory.mktemp("sanitized"), *options)


@shares_a_build
def test_kernels_under_sanitizers(sanitized):
    """Every instruction set and type of weights against double precision, on buffers without slack."""
    rows = len(SANITIZED_ISAS)
    assert run(sanitized / "check_kernels", "200", "1").endswith(f"{200 * rows} passed, 0 failed\n")
    assert run(sanitized / "check_int8", "40", "1").endswith(f"{40 * rows} passed, 0 failed\n")


@shares_a_build
def test_attention_under_sanitizers(sanitized):
    assert run(sanitized / "check_attention", "40", "1").endswith(" passed, 0 failed\n")


@shares_a_build
@pytest.mark.parametrize("isa", SANITIZED_ISAS)
def test_mutated_models_under_sanitizers(sanitized, isa):
    compiler = os.environ.get("CXX", "g++")
    # the C++ runtime too, or the sanitizer does not know how to throw; Python keeps some memory for good
    preload = [run(compiler, f"-print-file-name={name}").strip() for name in ("libasan.so", "libstdc++.so.6")]
    options = {"LD_PRELOAD": " ".join(preload), "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "halt_on_error=1"}
    environment = os.environ | options | {library.ISA_VARIABLE: isa}
    script = [sys.executable, ROOT / "tests" / "runtime" / "fuzz_native.py", sanitized / "libvitoats_ops.so", 400, 7]
    assert "sessions made" in run(*script, env=environment)


def test_mutated_models(tmp_path):
    script = ROOT / "tests" / "runtime" / "fuzz_native.py"
    assert "sessions made" in run(sys.executable, script, library.library_path(), 3000, 11)


@pytest.mark.skipif(platform.machine() == "aarch64", reason="runs natively here")
@pytest.mark.skipif(not (shutil.which(ARM_COMPILER) and shutil.which(ARM_EMULATOR)), reason="no cross compiler and emulator")
def test_neon_by_emulation(tmp_path):
    system = ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", "-DCMAKE_EXE_LINKER_FLAGS=-static"]
    build(tmp_path, *system, f"-DCMAKE_CXX_COMPILER={ARM_COMPILER}")
    assert run(ARM_EMULATOR, tmp_path / "check_kernels", "50", "1").endswith("200 passed, 0 failed\n")
    assert run(ARM_EMULATOR, tmp_path / "check_attention", "20", "1").endswith(" passed, 0 failed\n")
    # processors with products of int8 matrices, with dot products only, and without either
    for processor, rows in [("max", 4), ("neoverse-n1", 3), ("cortex-a57", 2)]:
        found = run(ARM_EMULATOR, "-cpu", processor, tmp_path / "check_int8", "30", "1")
        assert found.endswith(f"{30 * rows} passed, 0 failed\n")


def test_the_same_binary_in_the_oldest_onnx_runtime(tmp_path):
    """One library for all versions: the outputs of 1.17.3 are those of the newest, on every instruction set."""
    run(sys.executable, "-m", "venv", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *OLDEST)
    random = np.random.default_rng(0)
    S, bias = random_sparse(random, 70, 90, 0.6), random.standard_normal(70, np.float32)
    U, V = random_low_rank(random, 70, 90, 2, 11)
    onnx.save(operator_model(S, bias=bias, low_rank=(U, V)), tmp_path / "model.onnx")
    onnx.save(operator_model(np.full((2, 9), np.nan, np.float32)), tmp_path / "bad.onnx")
    x = random.standard_normal((2, 30, 90), np.float32)
    np.savez(tmp_path / "feed.npz", x=x)
    code = """
import sys
import numpy, onnxruntime
folder, library = sys.argv[1:]
options = onnxruntime.SessionOptions()
options.register_custom_ops_library(library)
session = onnxruntime.InferenceSession(folder + "/model.onnx", options, providers=["CPUExecutionProvider"])
numpy.save(folder + "/found.npy", session.run(None, dict(numpy.load(folder + "/feed.npz")))[0])
try:
    onnxruntime.InferenceSession(folder + "/bad.onnx", options, providers=["CPUExecutionProvider"])
except Exception as error:
    assert "infinite or NaN" in str(error), error
else:
    raise AssertionError("the native library was not asked")
print(onnxruntime.__version__)
"""
    for isa in ISAS:
        argv = [python, "-c", code, tmp_path, library.library_path()]
        assert run(*argv, env=os.environ | {library.ISA_VARIABLE: isa}) == "1.17.3\n"
        expected = x.astype(np.float64) @ (S + (U @ V).reshape(S.shape)).T + bias
        assert np.allclose(np.load(tmp_path / "found.npy"), expected, atol=1e-4)
