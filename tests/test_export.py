"""ONNX files: the operator's function body against NumPy, whole models against torch, and what ONNX Runtime folds."""

import json
from collections import Counter

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from vitoats import bitmask
from vitoats.checkpoint import save_checkpoint
from vitoats.errors import InputError, RunError
from vitoats.export.onnx_file import IR_VERSION, export_onnx
from vitoats.export.sparse_matmul import DOMAIN, NAME, OPSET, sparse_matmul_function
from vitoats.methods.oats import OATSConfig
from vitoats.models.loading import load_model
from vitoats.pipeline import compress
from vitoats.runtime.inference import metadata, session

IMAGES = torch.randn(7, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def operator_model(S: np.ndarray, value_type: type) -> onnx.ModelProto:
    values, mask = bitmask.pack(S)
    graph = helper.make_graph(
        [helper.make_node(NAME, ["x", "values", "mask"], ["y"], domain=DOMAIN, in_features=S.shape[1])],
        "operator",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", "t", S.shape[1]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", "t", S.shape[0]])],
        [numpy_helper.from_array(values.astype(value_type), "values"), numpy_helper.from_array(mask, "mask")],
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=opsets, functions=[sparse_matmul_function()], ir_version=IR_VERSION)


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 20),
    k=st.integers(1, 40),
    zeros=st.floats(0, 1),
    value_type=st.sampled_from([np.float32, np.float16]),
)
def test_function_body_is_the_sparse_product(seed, n, k, zeros, value_type):
    """Any N and K, also no multiples of 8, any density down to no entry at all."""
    random = np.random.default_rng(seed)
    S = random.standard_normal((n, k)).astype(value_type).astype(np.float32) * (random.random((n, k)) >= zeros)
    model = operator_model(S, value_type)
    onnx.checker.check_model(model, full_check=True)
    x = random.standard_normal((2, 3, k)).astype(np.float32)
    found = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
    assert np.allclose(found, x.astype(np.float64) @ S.T.astype(np.float64), atol=1e-4)


@pytest.fixture(scope="module")
def tiny_compressed(tiny_folder, tmp_path_factory):
    loaded = load_model(f"local-dir:{tiny_folder}")
    report = compress(
        loaded.timm_model, iter([IMAGES]), method="oats", config=OATSConfig(iterations=5), img_size=32, nsamples=7
    )
    folder = tmp_path_factory.mktemp("compressed") / "out"
    save_checkpoint(loaded, folder, report.to_dict())
    return load_model(str(folder))


@pytest.fixture(scope="module")
def exported(tiny_compressed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("onnx")
    return {
        form: (export_onnx(tiny_compressed, folder / f"{form}.onnx", form), folder / f"{form}.onnx")
        for form in ("sparse", "inline", "dense")
    }


FORMS = pytest.mark.parametrize("form", ["sparse", "inline", "dense"])


@FORMS
@pytest.mark.parametrize("batch", [1, 2, 7])
def test_outputs_are_those_of_torch(exported, tiny_compressed, form, batch):
    with torch.inference_mode():
        expected = tiny_compressed.model(IMAGES[:batch]).numpy()
    found = session(exported[form][1]).run(None, {"images": IMAGES[:batch].numpy()})[0]
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


@FORMS
def test_files_are_sound(exported, form):
    proto, path = exported[form]
    onnx.checker.check_model(str(path), full_check=True)
    onnx.shape_inference.infer_shapes(proto, strict_mode=True)
    assert proto.ir_version == 9
    assert {o.domain: o.version for o in proto.opset_import}[""] == 18
    shape = proto.graph.input[0].type.tensor_type.shape
    assert [d.dim_param or d.dim_value for d in shape.dim] == ["batch", 3, 32, 32]


def test_the_sparse_file_has_one_node_a_layer_with_readable_names(exported):
    proto, _ = exported["sparse"]
    nodes = [n for n in proto.graph.node if n.domain == DOMAIN]
    expected = [f"blocks.{b}.{n}" for b in range(3) for n in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
    assert [n.name for n in nodes] == expected
    assert [list(n.input[1:]) for n in nodes] == [[f"{e}.values", f"{e}.mask"] for e in expected]
    initializers = {i.name for i in proto.graph.initializer}
    assert {"blocks.0.attn.qkv.V", *(f"blocks.0.attn.qkv.U.{i}" for i in range(3))} <= initializers
    assert [f.name for f in proto.functions] == [NAME]


@pytest.mark.parametrize("form", ["inline", "dense"])
def test_other_forms_have_standard_operators_only(exported, form):
    proto, _ = exported[form]
    assert {n.domain for n in proto.graph.node} <= {"", "ai.onnx"}
    assert not proto.functions


@pytest.mark.parametrize("form", ["sparse", "inline"])
def test_onnx_runtime_folds_the_weights_once_and_for_all(exported, form, tmp_path):
    """Nothing of the unpacking is left to run: no Gather over values, no CumSum, no Where."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.log_severity_level = 3
    ort.InferenceSession(str(exported[form][1]), options, providers=["CPUExecutionProvider"])
    left = Counter(n.op_type for n in onnx.load(str(tmp_path / "optimized.onnx")).graph.node)
    assert not left.keys() & {"CumSum", "Where", "BitwiseAnd", NAME}
    assert left["MatMul"] + left["FusedMatMul"] >= 12


def test_the_sparse_file_is_smaller_by_what_was_removed(exported, tiny_compressed):
    from vitoats.layers import compressed_layers

    removed = sum(
        4 * (x.S.numel() - x.kept_parameters) - x.out_features * -(-x.in_features // 8)
        for x in compressed_layers(tiny_compressed.model).values()
    )
    sizes = {form: path.stat().st_size for form, (_, path) in exported.items()}
    assert abs(sizes["dense"] - sizes["sparse"] - removed) < 25_000  # more nodes, and the function


@FORMS
def test_no_paths_of_the_exporting_machine(exported, form):
    """torch.onnx notes a stack trace with each node."""
    content = exported[form][1].read_bytes()
    assert b"site-packages" not in content
    assert b"vitoats/export" not in content


@FORMS
def test_metadata_says_how_to_prepare_images(exported, tiny_compressed, form):
    described = metadata(session(exported[form][1]))
    assert described["preprocessing"] == json.loads(json.dumps(tiny_compressed.preprocessing.to_dict()))
    assert described["n_classes"] == 4
    assert described["form"] == form


def test_a_file_that_cannot_be_written(tiny_compressed, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        export_onnx(tiny_compressed, tmp_path / "file" / "model.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("content", [b"", b"not onnx", None])
def test_files_that_are_no_models_are_refused(tmp_path, content):
    path = tmp_path / "model.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"model\.onnx"):
        session(path)
