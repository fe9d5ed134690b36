"""ONNX files: the operator's function body against NumPy, whole models against torch, and what ONNX Runtime folds."""

import copy
import json
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import TINY, make_tiny
from tests.in_place import compress_in_place, job_of
from tests.runtime.sparse_models import operator_model, random_low_rank, random_sparse
from vitoats.common.errors import InputError, RunError
from vitoats.data.transforms import Preprocessing
from vitoats.export.layers import _stacked
from vitoats.export.onnx_file import export_onnx
from vitoats.export.verify import verify
from vitoats.format.layers import compressed_layers, replace_module
from vitoats.format.operator import ATTENTION, NAME
from vitoats.loading.checkpoint import save_checkpoint
from vitoats.loading.load import load_model
from vitoats.loading.loaded import LoadedModel
from vitoats.methods.oats import OATSConfig
from vitoats.runtime import metadata, session

import timm  # isort: skip

IMAGES = torch.randn(7, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 20),
    k=st.integers(1, 40),
    zeros=st.floats(0, 1),
    value_type=st.sampled_from([np.float32, np.float16]),
    has_bias=st.booleans(),
    rank=st.none() | st.integers(1, 5),
    blocks=st.integers(1, 3),
)
def test_function_body_is_the_sparse_and_low_rank_product(seed, n, k, zeros, value_type, has_bias, rank, blocks):
    """Any N and K, also no multiples of 8, any density down to no entry at all."""
    random = np.random.default_rng(seed)
    n *= blocks
    S = random_sparse(random, n, k, zeros, value_type)
    bias = random.standard_normal(n, np.float32) if has_bias else None
    low_rank = None if rank is None else random_low_rank(random, n, k, blocks, rank, value_type)
    model = operator_model(S, value_type, bias, low_rank)
    onnx.checker.check_model(model, full_check=True)
    x = random.standard_normal((2, 3, k), np.float32)
    opened = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found = opened.run(None, {"x": x})[0]
    W = S.astype(np.float64) + (0 if low_rank is None else (low_rank[0] @ low_rank[1]).reshape(n, k))
    expected = x.astype(np.float64) @ W.T + (bias if has_bias else 0)
    assert np.allclose(found, expected, atol=1e-4)


@pytest.fixture(scope="module")
def tiny_compressed(tiny_folder, tmp_path_factory):
    loaded = load_model(f"local-dir:{tiny_folder}")
    report = compress_in_place(loaded.timm_model, IMAGES, job_of("oats", OATSConfig(iterations=5)))
    folder = tmp_path_factory.mktemp("compressed") / "out"
    save_checkpoint(loaded, folder, report.to_dict())
    return load_model(str(folder))


@pytest.fixture(scope="module")
def exported(tiny_compressed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("onnx")
    return {
        form: (export_onnx(tiny_compressed, folder / f"{form}.onnx", form), folder / f"{form}.onnx")
        for form in ("sparse", "matmul", "inline", "dense")
    }


FORMS = pytest.mark.parametrize("form", ["sparse", "matmul", "inline", "dense"])


@FORMS
@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("batch", [1, 2, 7])
def test_outputs_are_those_of_torch(exported, tiny_compressed, form, batch, native):
    with torch.inference_mode():
        expected = tiny_compressed.model(IMAGES[:batch]).numpy()
    opened = session(exported[form][1], native=native)
    assert len(opened.native_nodes) == (12 if native and form in ("sparse", "matmul") else 0)
    found = opened.run(None, {"images": IMAGES[:batch].numpy()})[0]
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("form", ["sparse", "inline"])
def test_float16_halves_the_compressed_layers(exported, tiny_compressed, form, tmp_path):
    proto = export_onnx(tiny_compressed, tmp_path / "half.onnx", form, float16=True)
    onnx.checker.check_model(proto, full_check=True)
    kept = sum(layer.kept_parameters for layer in compressed_layers(tiny_compressed.model).values())
    saved = exported[form][1].stat().st_size - (tmp_path / "half.onnx").stat().st_size
    assert 0.9 * 2 * kept < saved <= 2 * kept  # less what a larger number of bytes, or Cast nodes, take to write down
    with torch.inference_mode():
        expected = tiny_compressed.model(IMAGES).numpy()
    for native in (True, False):
        found = session(tmp_path / "half.onnx", native=native).run(None, {"images": IMAGES.numpy()})[0]
        assert np.abs(found - expected).max() < 1e-2 * np.abs(expected).max()


def test_a_weight_too_large_for_float16_is_refused(tiny_compressed, tmp_path):
    large = copy.deepcopy(tiny_compressed)
    next(iter(compressed_layers(large.model).values())).S.data *= 1e6
    with pytest.raises(InputError, match="`float16`"):
        export_onnx(large, tmp_path / "half.onnx", float16=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("rank_ratios", [(0.0,), (0.0, 0.25)])
def test_layers_without_low_rank_alone_and_beside_others(tmp_path, rank_ratios):
    model = make_tiny()
    mixed = {}
    for ratio in rank_ratios:
        part = copy.deepcopy(model)
        config = OATSConfig(iterations=3, rank_ratio=ratio)
        compress_in_place(part, IMAGES, job_of("oats", config))
        mixed[ratio] = compressed_layers(part)
    for i, name in enumerate(mixed[rank_ratios[0]]):
        replace_module(model, name, mixed[rank_ratios[i % len(rank_ratios)]][name])
    loaded = LoadedModel("mixed", model, Preprocessing(img_size=32), "random")
    export_onnx(loaded, tmp_path / "model.onnx")
    with torch.inference_mode():
        expected = model(IMAGES).numpy()
    for native in (True, False):
        found = session(tmp_path / "model.onnx", native=native).run(None, {"images": IMAGES.numpy()})[0]
        assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize(
    "blocks",
    [
        [(4, 2)],
        [(4, 2), (4, 2), (4, 2)],
        # ranks that differ, down to none
        [(4, 3), (4, 0), (4, 1)],
        [(4, 0)],
        # heights that differ
        [(5, 2), (3, 1), (4, 0)],
    ],
)
def test_stacked_factors_stand_for_the_same_matrix(blocks):
    generator = torch.Generator().manual_seed(0)
    U = [torch.randn(rows, rank, generator=generator) for rows, rank in blocks]
    V = [torch.randn(rank, 7, generator=generator) for _, rank in blocks]
    stacked_U, stacked_V = _stacked(U, V)
    assert stacked_U.shape[-1] == stacked_V.shape[-2] >= 1
    expected = torch.cat([u @ v for u, v in zip(U, V, strict=True)])
    assert torch.allclose((stacked_U @ stacked_V).flatten(0, 1), expected, atol=1e-6)


@FORMS
def test_onnx_runtime_knows_the_gelu(exported, form, tmp_path):
    assert optimized_operators(exported[form][1], tmp_path)["Erf"] == 0


def test_outputs_that_are_not_finite_do_not_agree(tiny_compressed, exported):
    """The largest of 0 and NaN is 0."""
    broken = copy.deepcopy(tiny_compressed)
    broken.model.head.bias.data[0] = float("nan")
    with pytest.raises(RunError, match="outputs of the torch model are not finite"):
        verify(broken, session(exported["sparse"][1]))
    images = IMAGES.clone()
    images[2] = float("inf")
    with pytest.raises(RunError, match="for 1 of the 7 images"):
        verify(tiny_compressed, session(exported["sparse"][1]), [(images, torch.zeros(7))])


def test_verify_measures_and_lists(tiny_compressed, exported):
    labels = torch.zeros(len(IMAGES), dtype=torch.long)
    right = verify(tiny_compressed, session(exported["sparse"][1]), [(IMAGES, labels)])
    assert 0 < right.relative_error < 1e-5
    assert (right.n_images, right.differing) == (7, [])
    other = copy.deepcopy(tiny_compressed)
    other.model.head.bias.data[2] += 100  # torch now says class 2, by far
    wrong = verify(other, session(exported["sparse"][1]), [(IMAGES[:3], labels[:3]), (IMAGES[3:], labels[3:])])
    assert [i for i, _ in wrong.differing] == list(range(7))
    assert all(90 < margin < 110 for _, margin in wrong.differing)
    assert wrong.logit_error == pytest.approx(100, abs=1e-2)


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
    nodes = [n for n in proto.graph.node if n.op_type == NAME]
    expected = [f"blocks.{b}.{n}" for b in range(3) for n in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
    assert [n.name for n in nodes] == expected
    assert [list(n.input[1:4]) for n in nodes] == [[f"{e}.values", f"{e}.mask", f"{e}.bias"] for e in expected]
    initializers = {i.name for i in proto.graph.initializer}
    assert {f"{e}.{term}" for e in expected for term in "UV"} <= initializers
    assert [len(n.input) for n in nodes] == [6] * 12
    assert [f.name for f in proto.functions] == [NAME, ATTENTION]
    assert [n.name for n in proto.graph.node if n.op_type == ATTENTION] == [f"blocks.{b}.attn" for b in range(3)]


def test_the_low_rank_terms_can_be_plain_nodes(exported):
    """x V^T with all V_i side by side, its parts times U_i^T, and the sum."""
    graph = exported["matmul"][0].graph
    for block in range(3):
        for layer, parts in (("attn.qkv", 3), ("attn.proj", 1), ("mlp.fc1", 1), ("mlp.fc2", 1)):
            name = f"blocks.{block}.{layer}"
            node = next(n for n in graph.node if n.name == name)
            assert list(node.input[1:]) == [f"{name}.values", f"{name}.mask", f"{name}.bias"]
            inner = next(n for n in graph.node if n.op_type == "MatMul" and n.input[1] == f"{name}.V_stacked")
            assert inner.input[0] == node.input[0]
            assert sum(n.op_type == "MatMul" and n.input[1].startswith(f"{name}.U_blocks.") for n in graph.node) == parts


@pytest.mark.parametrize("form", ["inline", "dense"])
def test_other_forms_have_standard_operators_only(exported, form):
    proto, _ = exported[form]
    assert {n.domain for n in proto.graph.node} <= {"", "ai.onnx"}
    assert not proto.functions


def optimized_operators(path: Path, folder: Path) -> Counter:
    """How often each operator is left when stock ONNX Runtime has optimized the file."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.log_severity_level = 3
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return Counter(n.op_type for n in onnx.load(str(folder / "optimized.onnx")).graph.node)


@pytest.mark.parametrize("form", ["sparse", "matmul", "inline"])
def test_onnx_runtime_folds_the_weights_once_and_for_all(exported, form, tmp_path):
    """Nothing of the unpacking is left to run: no Gather over values, no CumSum, no Where."""
    left = optimized_operators(exported[form][1], tmp_path)
    assert not left.keys() & {"CumSum", "Where", "BitwiseAnd", NAME, ATTENTION}
    assert left["MatMul"] + left["FusedMatMul"] >= 12


def test_the_sparse_file_is_smaller_by_what_was_removed(exported, tiny_compressed):
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


def test_export_says_when_sparse_layers_are_not_sparse_any_more(tiny_compressed, tmp_path, caplog):
    filled = copy.deepcopy(tiny_compressed)
    layers = list(compressed_layers(filled.model).values())
    layers[0].S.data += 1e-3  # every entry
    layers[1].S.data.view(-1)[:20] += 1e-3  # a few
    proto = export_onnx(filled, tmp_path / "model.onnx")
    assert sum(node.op_type == NAME for node in proto.graph.node) == 11
    assert "2 compressed layers have more non-zeros than compress left" in caplog.text
    assert "1 compressed layers are written dense" in caplog.text


def test_one_output_is_verified(tmp_path):
    """There is no second class, and no other one to differ."""
    model = timm.create_model("vit_tiny_patch16_224", **{**TINY, "num_classes": 1, "depth": 1}).eval()
    loaded = LoadedModel("one", model, Preprocessing(img_size=32), "random")
    export_onnx(loaded, tmp_path / "model.onnx")
    found = verify(loaded, session(tmp_path / "model.onnx"), [(IMAGES, torch.zeros(7))])
    assert (found.n_images, found.differing) == (7, [])
