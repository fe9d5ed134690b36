"""The native operator QKVAttention: against float64 algebra on every instruction set, on special numbers and bad models."""

import threading

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper

from vitoats.export.onnx_file import IR_VERSION
from vitoats.format.operator import DOMAIN, OPSET
from vitoats.runtime import library

ISAS = library.available_isas()


def attention_model(**attributes) -> ModelProto:
    """y = QKVAttention(qkv) with dynamic shapes."""
    node = helper.make_node("QKVAttention", ["qkv"], ["y"], name="attention", domain=DOMAIN, **attributes)
    qkv, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["b", "t", name]) for name in ("qkv", "y"))
    graph = helper.make_graph([node], "attention", [qkv], [y])
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 2)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)


def open_attention(threads: int = 1, num_heads: int = 1, scale: float = 1.0, bfloat16: int = 0) -> ort.InferenceSession:
    return open_model(attention_model(num_heads=num_heads, scale=float(scale), bfloat16=bfloat16), threads)


def open_model(model: ModelProto, threads: int = 1) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    assert library.register(options)
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def attention(qkv: np.ndarray, heads: int, scale: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """In float64: y [b, t, heads width], the same with sizes of v, and the largest sum of a score's sizes, [b, t, heads, 1]."""
    b, t, columns = qkv.shape
    q, k, v = qkv.astype(np.float64).reshape(b, t, 3, heads, columns // 3 // heads).transpose(2, 0, 3, 1, 4)
    scores = scale * q @ k.swapaxes(-1, -2)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    y, size = ((weights @ values).swapaxes(1, 2).reshape(b, t, -1) for values in (v, np.abs(v)))
    score_size = abs(scale) * (np.abs(q) @ np.abs(k).swapaxes(-1, -2)).max(-1, keepdims=True)
    return y, size, score_size.swapaxes(1, 2)


def assert_close(found: np.ndarray, qkv: np.ndarray, heads: int, scale: float, bfloat16: bool) -> None:
    """Within the rounding errors of scores, weights and values; those of bfloat16 are 2^-9 of each number."""
    y, size, score_size = attention(qkv, heads, scale)
    of_score, of_term = (2**-8, 2**-7) if bfloat16 else (2**-20, 2**-20)
    error = np.expm1(2 * of_score * score_size) + of_term
    split = (*y.shape[:2], heads, -1)
    assert found.shape == y.shape
    assert np.all(np.abs(found - y).reshape(split) <= error * size.reshape(split) + 1e-30)


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    monkeypatch.setenv(library.ISA_VARIABLE, request.param)
    return request.param


@pytest.mark.parametrize("name", ISAS)
@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    batch=st.integers(0, 3),
    tokens=st.integers(0, 140),
    heads=st.integers(1, 5),
    width=st.sampled_from([32, 64, 80, 88, 96, 128]) | st.integers(1, 140),
    scale=st.sampled_from([0.125, 1, 0, -0.5]),
    spread=st.sampled_from([0.1, 1, 5]),
    bfloat16=st.booleans(),
    threads=st.sampled_from([1, 2]),
)
def test_attention_is_that_of_float64_algebra(name, seed, batch, tokens, heads, width, scale, spread, bfloat16, threads):
    qkv = (spread * np.random.default_rng(seed).standard_normal((batch, tokens, 3 * heads * width))).astype(np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(library.ISA_VARIABLE, name)
        opened = open_attention(threads, heads, scale, int(bfloat16))
    found = opened.run(None, {"qkv": qkv})[0]
    if qkv.size:
        assert_close(found, qkv, heads, scale, bfloat16)
    else:
        assert found.shape == (batch, tokens, heads * width)


@pytest.mark.parametrize("bfloat16", [0, 1])
@pytest.mark.parametrize("tokens", [197, 261, 512, 513, 1370])
def test_numbers_of_tokens_that_matter(isa, tokens, bfloat16):
    """One block of keys and several."""
    qkv = np.random.default_rng(tokens).standard_normal((1, tokens, 3 * 2 * 64)).astype(np.float32)
    found = open_attention(1, 2, 0.125, bfloat16).run(None, {"qkv": qkv})[0]
    assert_close(found, qkv, 2, 0.125, bool(bfloat16))


def test_bfloat16_is_as_exact_as_its_rounding(isa):
    """The error of an output is that of many independent roundings, far below the bound for the worst case."""
    qkv = np.random.default_rng(0).standard_normal((2, 197, 3 * 3 * 64)).astype(np.float32)
    found = open_attention(1, 3, 0.125, 1).run(None, {"qkv": qkv})[0]
    y, _, _ = attention(qkv, 3, 0.125)
    assert np.sqrt(np.mean((found - y) ** 2) / np.mean(y**2)) < 0.006


def test_exp_is_exact_to_two_units_in_the_last_place(isa):
    """Two tokens with scores x and 0, and values 1 and 0: y = e^x / (1 + e^x) for the first; dividing adds two units."""
    x = -np.concatenate([np.linspace(0, 30, 40_001), np.geomspace(1e-7, 86, 40_001)]).astype(np.float32)
    qkv = np.zeros((len(x), 2, 3), np.float32)
    qkv[:, 0, 0], qkv[:, 0, 1], qkv[:, 0, 2] = x, 1, 1
    found = open_attention().run(None, {"qkv": qkv})[0][:, 0, 0].astype(np.float64)
    expected = 1 / (1 + np.exp(-x.astype(np.float64)))
    rounding_of_score = np.abs(x.astype(np.float64)) * 2**-23
    assert np.all(np.abs(found / expected - 1) <= 4 * 2**-23 + rounding_of_score)


def test_very_unequal_scores(isa):
    """Weights below the smallest float are zero; the block of keys with the largest score comes last."""
    tokens = 1100
    qkv = np.zeros((1, tokens, 3 * 4), np.float32)
    qkv[..., :4] = 10
    qkv[..., 4:8] = np.linspace(-300, 300, tokens)[None, :, None]
    qkv[..., 8:] = np.arange(tokens, dtype=np.float32)[None, :, None]
    found = open_attention().run(None, {"qkv": qkv})[0]
    assert np.all(found == tokens - 1)


@pytest.mark.parametrize("bfloat16", [0, 1])
@pytest.mark.parametrize("number", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("part", ["q", "k", "v"])
@pytest.mark.parametrize("tokens", [7, 600])
def test_infinities_and_nan_stay_where_they_belong(isa, tokens, part, number, bfloat16):
    """A query's in its own row of the head; those of keys and values in the whole head of that image."""
    random = np.random.default_rng(0)
    batch, heads, width = 2, 3, 20
    qkv = random.standard_normal((batch, tokens, 3, heads, width)).astype(np.float32)
    clean = qkv.copy()
    qkv[1, 4, "qkv".index(part), 2, 19] = number
    opened = open_attention(2, heads, 0.2, bfloat16)
    found, expected = (opened.run(None, {"qkv": a.reshape(batch, tokens, -1)})[0] for a in (qkv, clean))
    hit = np.zeros((batch, tokens, heads, width), bool)
    hit[1, 4 if part == "q" else slice(None), 2] = True
    hit = hit.reshape(found.shape)
    assert np.isnan(found[hit]).all()
    assert np.array_equal(found[~hit], expected[~hit])


def test_a_query_whose_scores_overflow_has_nan(isa):
    qkv = np.random.default_rng(0).standard_normal((1, 30, 3, 1, 8)).astype(np.float32)
    qkv[0, 3, 0], qkv[0, :, 1] = 1e30, 1e20
    found = open_attention().run(None, {"qkv": qkv.reshape(1, 30, -1)})[0]
    assert np.array_equal(np.isnan(found).any(-1)[0].nonzero()[0], [3])


def test_subnormal_numbers_count_as_zero(isa):
    qkv = np.full((1, 5, 3 * 16), 1e-40, np.float32)
    assert np.all(open_attention().run(None, {"qkv": qkv})[0] == 0)


@pytest.mark.parametrize("bfloat16", [0, 1])
def test_results_do_not_depend_on_threads_and_sessions(isa, bfloat16):
    """Few heads are split into blocks of queries, many heads are not; several sessions at once from several threads."""
    random = np.random.default_rng(0)
    inputs = [random.standard_normal((batch, 100, 3 * 2 * 40)).astype(np.float32) for batch in (1, 40)]
    opened = [open_attention(threads, 2, 0.2, bfloat16) for threads in (1, 2)]
    alone = [opened[0].run(None, {"qkv": qkv})[0] for qkv in inputs]
    assert np.array_equal(np.concatenate([opened[0].run(None, {"qkv": image[None]})[0] for image in inputs[1]]), alone[1])
    same = []

    def repeat(session):
        for _ in range(5):
            for qkv, expected in zip(inputs, alone, strict=True):
                same.append(np.array_equal(session.run(None, {"qkv": qkv})[0], expected))

    threads = [threading.Thread(target=repeat, args=(session,)) for session in opened * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert same == [True] * 40


GOOD = {"num_heads": 2, "scale": 0.5, "bfloat16": 0}
BAD = {
    "num_heads is 0": {"num_heads": 0},
    "num_heads is -3": {"num_heads": -3},
    "attribute num_heads": {"num_heads": None},
    "scale is infinite or NaN": {"scale": float("inf")},
    "attribute scale": {"scale": None},
    "bfloat16 is 2": {"bfloat16": 2},
    "bfloat16 is -1": {"bfloat16": -1},
    "attribute bfloat16": {"bfloat16": None},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_attributes_are_refused_when_the_session_is_made(message):
    attributes = {name: value for name, value in (GOOD | BAD[message]).items() if value is not None}
    with pytest.raises(Exception, match=f"vitoats::QKVAttention: .*{message}"):
        open_model(attention_model(**attributes))


@pytest.mark.parametrize("shape", [(12,), (2, 12), (1, 2, 3, 12), (1, 2, 10), (1, 2, 9), (1, 2, 1)])
def test_bad_shapes_are_refused_when_it_runs(shape):
    model = attention_model(**GOOD)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.ClearField("shape")
    with pytest.raises(Exception, match=r"qkv has shape .*not \[batch, tokens, 3 num_heads width\] with num_heads = 2"):
        open_model(model).run(None, {"qkv": np.zeros(shape, np.float32)})


def test_empty_tensors_with_large_dimensions(isa):
    model = attention_model(**GOOD)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.ClearField("shape")
    opened = open_model(model)
    for shape in [(0, 2**40, 12), (2**40, 0, 12), (2**30, 2**30, 0)]:
        assert opened.run(None, {"qkv": np.zeros(shape, np.float32)})[0].shape == (*shape[:2], shape[2] // 3)


def test_the_shape_of_y_is_inferred():
    model = attention_model(**GOOD)
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 36
    model.graph.output[0].type.tensor_type.ClearField("shape")
    assert open_model(model).get_outputs()[0].shape == ["b", "t", 12]
