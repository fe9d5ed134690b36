"""Sessions: with the native library, and the same files without it."""

import logging
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto

from tests.runtime.sparse_models import operator_model, random_low_rank, random_sparse
from vitoats.common.errors import InputError
from vitoats.runtime import library, session
from vitoats.runtime.densify import densified
from vitoats.runtime.inference import inference


@pytest.fixture(autouse=True)
def _warnings(caplog):
    caplog.set_level(logging.WARNING, "vitoats")


@pytest.fixture
def case(tmp_path):
    """A file with all six inputs, what to feed it, and what comes out."""
    random = np.random.default_rng(0)
    S = random_sparse(random, 30, 20, 0.5)
    bias = random.standard_normal(30, np.float32)
    path = tmp_path / "model.onnx"
    U, V = random_low_rank(random, 30, 20, 3, 4, np.float16)
    onnx.save(operator_model(S, np.float16, bias, (U, V)), path)
    feed = {"x": random.standard_normal((2, 5, 20), np.float32)}
    W = S.astype(np.float16).astype(np.float64) + (U.astype(np.float64) @ V).reshape(30, 20)
    return path, feed, feed["x"] @ W.T + bias


@pytest.fixture
def no_library(monkeypatch):
    monkeypatch.setattr(library, "library_path", lambda: None)
    library._library.cache_clear()
    yield
    library._library.cache_clear()


def test_nodes_run_natively(case, caplog):
    path, feed, expected = case
    opened = session(path)
    assert opened.native_nodes == ("layer",)
    assert np.allclose(opened.run(None, feed)[0], expected, atol=1e-4)
    assert caplog.text == ""


def test_native_can_be_left_out(case, caplog):
    path, feed, expected = case
    opened = session(path, native=False)
    assert opened.native_nodes == ()
    assert np.allclose(opened.run(None, feed)[0], expected, atol=1e-4)
    assert caplog.text == ""


def test_without_the_library_the_file_runs_and_says_so(case, no_library, caplog):
    path, feed, expected = case
    opened = session(path)
    assert opened.native_nodes == ()
    assert np.allclose(opened.run(None, feed)[0], expected, atol=1e-4)
    assert caplog.text.count("dense speed") == 1


def test_without_the_library_and_without_onnx(case, no_library, monkeypatch):
    """ONNX Runtime unpacks the function's body by itself."""
    path, feed, expected = case
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert densified(path) is None
    assert np.allclose(session(path).run(None, feed)[0], expected, atol=1e-4)


def test_the_densified_model_is_plain(case):
    path, feed, expected = case
    model = onnx.load_from_string(densified(path))
    assert [n.op_type for n in model.graph.node] == ["MatMul", "Add"]
    assert {t.name for t in model.graph.initializer} == {"layer.dense", "bias"}
    onnx.checker.check_model(model, full_check=True)
    opened = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    assert np.allclose(opened.run(None, feed)[0], expected, atol=1e-4)


def test_what_cannot_be_densified_is_left_to_onnx_runtime(tmp_path, no_library):
    """float16 activations: no MatMul of both types, but the function casts."""
    S = random_sparse(np.random.default_rng(0), 6, 9, 0.5, np.float16)
    model = operator_model(S, np.float16)
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
    onnx.save(model, tmp_path / "half.onnx")
    x = np.random.default_rng(1).standard_normal((1, 3, 9)).astype(np.float16)
    assert np.allclose(session(tmp_path / "half.onnx").run(None, {"x": x})[0], x @ S.T, atol=0.05)


@pytest.mark.parametrize("content", [b"", b"SparseMatMul", b"\x08\x09SparseMatMul", None])
@pytest.mark.parametrize("native", [True, False])
def test_files_that_are_no_models_are_refused(tmp_path, content, native):
    path = tmp_path / "model.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"model\.onnx"):
        session(path, native=native)


def test_a_wrong_instruction_set_is_one_line(case, monkeypatch):
    monkeypatch.setenv(library.ISA_VARIABLE, "pentium")
    with pytest.raises(InputError, match="VITOATS_ISA=pentium"):
        session(case[0])


def test_options_with_the_library_make_many_sessions(case):
    path, feed, expected = case
    options = ort.SessionOptions()
    assert library.register(options)
    for _ in range(3):
        opened = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        assert np.allclose(opened.run(None, feed)[0], expected, atol=1e-4)


def test_registering_twice_is_an_error_of_the_session(case):
    options = ort.SessionOptions()
    assert library.register(options)
    assert library.register(options)
    with pytest.raises(Exception, match="already"):
        ort.InferenceSession(str(case[0]), options, providers=["CPUExecutionProvider"])


def test_the_library_needs_no_python(case):
    """Nothing but the C and C++ runtimes: any program can load it."""
    path = library.library_path()
    assert path is not None
    needed = subprocess.run(["ldd", str(path)], capture_output=True, text=True, check=True).stdout
    names = {line.split()[0].split("/")[-1].split(".")[0] for line in needed.splitlines()}
    assert names <= {"linux-vdso", "libstdc++", "libm", "libgcc_s", "libc", "ld-linux-x86-64", "ld-linux-aarch64", "libpthread"}


def test_inference_feeds_the_only_input(tmp_path):
    onnx.save(operator_model(np.eye(4, dtype=np.float32)), tmp_path / "eye.onnx")
    x = np.arange(8, dtype=np.float32).reshape(1, 2, 4)
    assert np.array_equal(inference(session(tmp_path / "eye.onnx"), x)()[0], x)
