"""int8 nodes in a session without the native library: standard nodes with dense weights, in the order of their names."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from tests.runtime.int8_models import attention, attention_model, int8_model, random_case
from vitoats.format.operator import INT8_OPERATORS, SPARSE_INT8
from vitoats.runtime import session
from vitoats.runtime.densify import densified


@pytest.mark.parametrize("name", INT8_OPERATORS)
def test_densified_models_compute_the_same(name, tmp_path):
    random = np.random.default_rng(0)
    parts = 3 if INT8_OPERATORS[name].weights == SPARSE_INT8 else 1
    case = random_case(random, name, 48, 21, parts=parts, rank=5)
    onnx.save(int8_model(case), tmp_path / "model.onnx")
    content = densified(tmp_path / "model.onnx")
    assert content is not None
    model = onnx.load_from_string(content)
    onnx.checker.check_model(model, full_check=True)
    operator = case.operator
    suffix = {"": [], "Gelu": ["Gelu"], "Add": ["Add"]}[operator.suffix]
    expected = [*(["LayerNormalization"] if operator.layer_norm else []), "MatMul", "Add", *suffix]
    assert [node.op_type for node in model.graph.node] == expected
    assert {t.name for t in model.graph.initializer} == {
        *("layer.dense", "bias"),
        *(("norm_weight", "norm_bias") if operator.layer_norm else ()),
    }
    feed = {"x": random.standard_normal((2, 3, 21), np.float32)}
    if operator.suffix == "Add":
        feed["residual"] = random.standard_normal((2, 3, 48), np.float32)
    opened = ort.InferenceSession(content, providers=["CPUExecutionProvider"])
    found = opened.run(None, feed)[0]
    assert np.allclose(found, case.expected(feed["x"], feed.get("residual")), atol=1e-4)
    assert np.allclose(session(tmp_path / "model.onnx", native=False).run(None, feed)[0], found, atol=1e-6)


def test_attention_is_left_to_its_function(tmp_path):
    onnx.save(attention_model(3, 8, 0.25), tmp_path / "model.onnx")
    qkv = np.random.default_rng(0).standard_normal((2, 5, 72), np.float32)
    found = session(tmp_path / "model.onnx", native=False).run(None, {"qkv": qkv})[0]
    assert np.allclose(found, attention(qkv, 3, 0.25), atol=1e-5)
