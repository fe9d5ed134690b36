"""The programs of docs/deploy.md in C and C++: compiled, linked to the ONNX Runtime of the Python package, and run.

The package has no headers. C is compiled without them, too, against HEADER and SIGNATURES: the functions that the program
calls, as onnxruntime_c_api.h publishes them (MIT licence, Copyright (c) Microsoft Corporation), at their places in ``OrtApi``.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.runtime.sparse_models import operator_model, random_sparse
from tests.runtime.test_ort_abi import API, HEADERS
from vitoats.runtime import library

DOCS = (Path(__file__).parent.parent.parent / "docs" / "deploy.md").read_text()
LIBRARY = next((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*"), None)
pytestmark = [
    pytest.mark.skipif(sys.platform != "linux" or shutil.which("g++") is None, reason="needs g++ on Linux"),
    pytest.mark.skipif(LIBRARY is None, reason="this package of ONNX Runtime has no libonnxruntime.so"),
    pytest.mark.skipif(library.library_path() is None, reason="the native library is not built"),
]

HEADER = """
#include <stddef.h>
#include <stdint.h>
typedef struct OrtStatus OrtStatus;
typedef struct OrtEnv OrtEnv;
typedef struct OrtSessionOptions OrtSessionOptions;
typedef struct OrtSession OrtSession;
typedef struct OrtRunOptions OrtRunOptions;
typedef struct OrtMemoryInfo OrtMemoryInfo;
typedef struct OrtValue OrtValue;
typedef struct OrtApi OrtApi;
typedef enum {{ ORT_LOGGING_LEVEL_WARNING = 2 }} OrtLoggingLevel;
typedef enum {{ OrtArenaAllocator = 1 }} OrtAllocatorType;
typedef enum {{ OrtMemTypeDefault = 0 }} OrtMemType;
typedef enum {{ ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT = 1 }} ONNXTensorElementDataType;
typedef struct {{
  const OrtApi* (*GetApi)(uint32_t);
  const char* (*GetVersionString)(void);
}} OrtApiBase;
const OrtApiBase* OrtGetApiBase(void);
struct OrtApi {{
{members}
}};
"""
SIGNATURES = {
    "GetErrorMessage": "const char* (*GetErrorMessage)(const OrtStatus*)",
    "CreateEnv": "OrtStatus* (*CreateEnv)(OrtLoggingLevel, const char*, OrtEnv**)",
    "CreateSession": "OrtStatus* (*CreateSession)(const OrtEnv*, const char*, const OrtSessionOptions*, OrtSession**)",
    "Run": "OrtStatus* (*Run)(OrtSession*, const OrtRunOptions*, const char* const*, const OrtValue* const*, size_t,"
    " const char* const*, size_t, OrtValue**)",
    "CreateSessionOptions": "OrtStatus* (*CreateSessionOptions)(OrtSessionOptions**)",
    "CreateTensorWithDataAsOrtValue": "OrtStatus* (*CreateTensorWithDataAsOrtValue)(const OrtMemoryInfo*, void*, size_t,"
    " const int64_t*, size_t, ONNXTensorElementDataType, OrtValue**)",
    "GetTensorMutableData": "OrtStatus* (*GetTensorMutableData)(OrtValue*, void**)",
    "CreateCpuMemoryInfo": "OrtStatus* (*CreateCpuMemoryInfo)(OrtAllocatorType, OrtMemType, OrtMemoryInfo**)",
    "RegisterCustomOpsLibrary_V2": "OrtStatus* (*RegisterCustomOpsLibrary_V2)(OrtSessionOptions*, const char*)",
}


def printed(folder: Path, language: str, include: Path) -> float:
    """What the program of the documents prints for an image of zeros: the first logit."""
    program = re.search(rf"```{language}\n(.*?)```", DOCS, re.DOTALL)[1]
    source = folder / f"main.{language}"
    source.write_text(program.replace("libvitoats_ops.so", str(library.library_path())))
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):  # to link, and to load
        (folder / name).symlink_to(LIBRARY)
    compiler = ["g++", "-std=c++17"] if language == "cpp" else ["gcc", "-std=c11"]
    command = [*compiler, "-Wall", "-Wextra", "-Werror", f"-I{include}", source, f"-L{folder}", "-lonnxruntime", "-o", "main"]
    done = subprocess.run(list(map(str, command)), cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    done = subprocess.run(
        ["./main"], cwd=folder, capture_output=True, text=True, env=os.environ | {"LD_LIBRARY_PATH": str(folder)}
    )
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


@pytest.fixture
def bias(tmp_path) -> np.ndarray:
    """The answer of vitb14.onnx to zeros. Its node has no body, so that without the native library it does not load."""
    random = np.random.default_rng(0)
    bias = random.standard_normal(10, np.float32)
    model = operator_model(random_sparse(random, 10, 224, 0.5), bias=bias, function=False)
    model.graph.node.insert(0, helper.make_node("Reshape", ["images", "shape"], ["x"]))
    model.graph.initializer.append(numpy_helper.from_array(np.array([1, 672, 224]), "shape"))
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 3, 224, 224]))
    model.graph.node[1].output[0] = model.graph.output[0].name = "logits"
    onnx.save(model, tmp_path / "vitb14.onnx")
    return bias


def test_the_program_in_c_against_declarations_by_hand(bias, tmp_path):
    slots = " ".join(API.values()).split()
    members = "\n".join(f"  {SIGNATURES.get(name, f'void* {name}')};" for name in slots)
    (tmp_path / "onnxruntime_c_api.h").write_text(HEADER.format(members=members))
    assert printed(tmp_path, "c", tmp_path) == pytest.approx(bias[0], abs=1e-5)


@pytest.mark.skipif(not HEADERS, reason="no package of ONNX Runtime's headers is installed")
@pytest.mark.parametrize("language", ["c", "cpp"])
def test_the_programs_against_the_headers(bias, tmp_path, language):
    assert printed(tmp_path, language, HEADERS[0].parent) == pytest.approx(bias[0], abs=1e-5)
