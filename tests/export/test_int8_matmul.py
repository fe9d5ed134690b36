"""The bodies of the int8 operators in stock ONNX Runtime, against NumPy, and what is left of them after loading."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.runtime.int8_models import int8_model, random_case
from vitoats.format.operator import INT8_OPERATORS, SPARSE_INT8


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    name=st.sampled_from(sorted(INT8_OPERATORS)),
    n=st.integers(1, 40),
    k=st.integers(1, 40),
    zeros=st.floats(0, 1),
    parts=st.integers(1, 3),
    rank=st.integers(1, 35),
)
def test_bodies_compute_the_product(seed, name, n, k, zeros, parts, rank):
    """Any sizes and ranks, also no multiples of strips and quads, and any density down to no entry at all."""
    random = np.random.default_rng(seed)
    case = random_case(random, name, n if parts == 1 else 16 * parts, k, zeros, parts, rank)
    model = int8_model(case)
    onnx.checker.check_model(model, full_check=True)
    feed = {"x": random.standard_normal((2, 3, k), np.float32)}
    if case.operator.suffix == "Add":
        feed["residual"] = random.standard_normal((2, 3, len(case.W)), np.float32)
    opened = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    expected = case.expected(feed["x"], feed.get("residual"))
    if not (case.operator.layer_norm and k < 4):  # a norm over few numbers may divide by almost nothing
        assert np.allclose(opened.run(None, feed)[0], expected, atol=1e-5 * max(1, np.abs(expected).max()))


@pytest.mark.parametrize("name", INT8_OPERATORS)
def test_onnx_runtime_folds_all_weights_into_one_dense_product(name, tmp_path):
    parts = 3 if INT8_OPERATORS[name].weights == SPARSE_INT8 else 1
    model = int8_model(random_case(np.random.default_rng(0), name, 48, 20, parts=parts, rank=18))
    left = optimized(model, tmp_path)
    expected = Counter(["MatMul", "Add"])
    expected += Counter(["LayerNormalization"] if INT8_OPERATORS[name].layer_norm else [])
    suffix = INT8_OPERATORS[name].suffix
    if suffix == "Gelu":
        expected = expected - Counter(["Add"]) + Counter(["BiasGelu"])
    if suffix == "Add":
        expected += Counter(["Add"])
    assert left == expected


def optimized(model: onnx.ModelProto, folder: Path) -> Counter:
    """How often each operator is left when stock ONNX Runtime has optimized a model."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.log_severity_level = 3
    ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return Counter(n.op_type for n in onnx.load(str(folder / "optimized.onnx")).graph.node)
