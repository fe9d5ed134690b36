"""The body of QKVAttention in stock ONNX Runtime, against NumPy, and what is left of it after loading."""

import numpy as np
import onnx
import onnxruntime as ort
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.export.test_int8_matmul import optimized
from tests.runtime.int8_models import attention, attention_model


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 10**6),
    batch=st.integers(1, 3),
    tokens=st.integers(1, 20),
    heads=st.integers(1, 4),
    width=st.integers(1, 20),
    scale=st.floats(-1, 1, width=32),
)
def test_the_body_is_attention(seed, batch, tokens, heads, width, scale):
    qkv = np.random.default_rng(seed).standard_normal((batch, tokens, 3 * heads * width), np.float32)
    model = attention_model(heads, width, scale)
    onnx.checker.check_model(model, full_check=True)
    opened = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    assert np.allclose(opened.run(None, {"qkv": qkv})[0], attention(qkv, heads, scale), atol=1e-5)


def test_the_scale_becomes_part_of_the_product(tmp_path):
    left = optimized(attention_model(3, 16, 0.25), tmp_path)
    assert left == {"Reshape": 2, "Transpose": 4, "Split": 1, "Squeeze": 3, "FusedMatMul": 1, "Softmax": 1, "MatMul": 1}
