"""Nodes of several operators: against their stages as nodes of their own, and what only they can do wrong."""

import threading

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.runtime.int8_models import CompositeCase, composite_model, random_composite, stages_model
from tests.runtime.sparse_models import replace_constant
from tests.runtime.test_native import open_native
from vitoats.format.operator import ATTENTION, COMPOSITES
from vitoats.runtime import library, session
from vitoats.runtime.densify import densified

ISAS = library.available_isas()
MLP = "LayerNormSparseMatMulInt8GeluMatMulInt8Add"
BLOCK_ATTENTION = "LayerNormSparseMatMulInt8QKVAttention"


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    monkeypatch.setenv(library.ISA_VARIABLE, request.param)
    return request.param


def run(case: CompositeCase, x: np.ndarray, isa: str | None = None, threads: int = 1, bfloat16: bool = False) -> np.ndarray:
    model = composite_model(case)
    for attribute in model.graph.node[0].attribute:
        if attribute.name == "bfloat16":
            attribute.i = int(bfloat16)
    with pytest.MonkeyPatch.context() as patch:
        if isa:
            patch.setenv(library.ISA_VARIABLE, isa)
        return open_native(model, threads).run(None, {"x": x})[0]


def run_stages(case: CompositeCase, x: np.ndarray) -> np.ndarray:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    assert library.register(options)
    opened = ort.InferenceSession(stages_model(case).SerializeToString(), options, providers=["CPUExecutionProvider"])
    return opened.run(None, {"x": x})[0]


def error(found: np.ndarray, exact: np.ndarray) -> float:
    return float(np.sqrt(((found - exact) ** 2).mean() / exact.var()))


@pytest.mark.parametrize("isa_name", ISAS)
@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 10**6),
    name=st.sampled_from(sorted(COMPOSITES)),
    batch=st.integers(1, 4),
    tokens=st.integers(1, 60),
    width=st.integers(8, 130),
    hidden=st.integers(1, 80),
    special=st.sampled_from([None, np.inf, -np.inf, np.nan]),
    bfloat16=st.booleans(),
    threads=st.sampled_from([1, 2]),
)
def test_composites_are_as_exact_as_their_stages(
    isa_name, seed, name, batch, tokens, width, hidden, special, bfloat16, threads
):
    """What passes between the stages is shorter than float32, which adds less than the quantization behind it.

    In an MLP, a token with an infinity or NaN has NaN in all outputs, in attention all tokens of its image; no others change.
    """
    random = np.random.default_rng(seed)
    case = random_composite(random, name, width, hidden)
    x = random.standard_normal((batch, tokens, width), np.float32)
    hit = np.zeros((batch, tokens), bool)
    if special is not None:
        image, token = random.integers(batch), random.integers(tokens)
        hit[image, slice(None) if case.heads else token] = True
        clean = x.copy()
        x[image, token, random.integers(width)] = special
    else:
        clean = x
    exact, stages, found = case.expected(clean), run_stages(case, clean), run(case, x, isa_name, threads, bfloat16)
    assert np.isnan(found[hit]).all()
    if not hit.all() and exact[~hit].size > 1:
        found, stages, exact = found[~hit], stages[~hit], exact[~hit]
        assert error(found, exact) <= 1.5 * error(stages, exact) + (0.02 if bfloat16 and case.heads else 0.003)


@pytest.mark.parametrize("name", [MLP, BLOCK_ATTENTION])
def test_results_do_not_depend_on_what_runs_beside(isa, name):
    """Chunks of tokens or images that do not fit the cache together; sessions of several threads, at once."""
    random = np.random.default_rng(0)
    case = random_composite(random, name, 16, 4096 if name == MLP else 256)
    batch, tokens = (1, 700) if name == MLP else (4, 500)  # 2 MB of hidden activations are 256 tokens, or 341 of qkv in float32
    x = random.standard_normal((batch, tokens, 16), np.float32)
    whole = run(case, x, isa)
    if name == MLP:
        assert np.array_equal(run(case, x[:, 100:103], isa), whole[:, 100:103])
    else:
        assert np.array_equal(run(case, x[2:3], isa), whole[2:3])
    found = []
    threads = [threading.Thread(target=lambda n=n: found.append(run(case, x, None, n))) for n in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [np.array_equal(y, whole) for y in found] == [True] * 3


def test_hidden_activations_above_the_largest_float16_become_that_one(isa):
    case = random_composite(np.random.default_rng(0), MLP, 8, 40)
    first, second = case.products
    first.constants["bias"][:] = 1e6
    x = np.random.default_rng(1).standard_normal((1, 20, 8), np.float32)
    found = run(case, x, isa)
    hidden = np.full((1, 20, 40), 65504.0)
    assert np.isfinite(found).all()
    assert error(found, second.expected(hidden, x)) < 1e-2


@pytest.mark.parametrize("shape", [(0, 5, 16), (2, 0, 16)])
@pytest.mark.parametrize("name", [MLP, BLOCK_ATTENTION])
def test_no_tokens(isa, name, shape):
    case = random_composite(np.random.default_rng(0), name, 16, 8)
    assert run(case, np.zeros(shape, np.float32), isa).shape == (*shape[:2], 16)


@pytest.mark.parametrize("name", COMPOSITES)
def test_bodies_and_densified_models_compute_the_same(name, tmp_path):
    random = np.random.default_rng(0)
    case = random_composite(random, name, 21, 24)
    x = random.standard_normal((2, 3, 21), np.float32)
    model = composite_model(case)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, tmp_path / "model.onnx")
    content = densified(tmp_path / "model.onnx")
    assert content is not None
    by_body = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
    dense = session(tmp_path / "model.onnx", native=False).run(None, {"x": x})[0]
    expected = case.expected(x)
    assert np.allclose(by_body, expected, atol=1e-4 * np.abs(expected).max())
    assert np.allclose(dense, expected, atol=1e-4 * np.abs(expected).max())
    left = {node.op_type for node in onnx.load_from_string(content).graph.node if node.domain == "vitoats"}
    assert left == ({ATTENTION} if case.heads else set())


BROKEN = [
    (MLP, {}, {"hidden_features": 25}, "hidden_features|shape"),
    (
        MLP,
        {"fc2_weight": np.zeros((1, 5, 16, 4), np.int8)},
        {"hidden_features": 20},
        "hidden_features is 20, but .* 24 outputs",
    ),
    (
        MLP,
        {
            "fc2_weight": np.zeros((2, 6, 16, 4), np.int8),
            "fc2_scale": np.ones(20, np.float32),
            "fc2_bias": np.ones(20, np.float32),
        },
        {},
        "the second product has 20 outputs, and x has 16",
    ),
    (MLP, {"fc1_scale": np.full(24, np.nan, np.float32)}, {}, "a number of scale is infinite or NaN"),
    (MLP, {"fc2_bias": np.zeros(3, np.float32)}, {}, r"bias has shape \[3\], not \[16\]"),
    (BLOCK_ATTENTION, {}, {"num_heads": 5}, "144 outputs, not 3 num_heads width with num_heads = 5"),
    (BLOCK_ATTENTION, {}, {"num_heads": 0}, "num_heads is 0"),
    (BLOCK_ATTENTION, {}, {"scale": np.inf}, "scale is infinite or NaN"),
    (BLOCK_ATTENTION, {}, {"bfloat16": 2}, "bfloat16 is 2"),
]


@pytest.mark.parametrize(("name", "constants", "attributes", "message"), BROKEN)
def test_a_malformed_model_is_an_error_of_the_session(name, constants, attributes, message):
    model = composite_model(random_composite(np.random.default_rng(0), name, 16, 24), function=False)
    for constant, array in constants.items():
        replace_constant(model, constant, array)
    for attribute in model.graph.node[0].attribute:
        if attribute.name in attributes:
            value = attributes[attribute.name]
            attribute.CopyFrom(onnx.helper.make_attribute(attribute.name, value))
    with pytest.raises(Exception, match=message):
        open_native(model)


@pytest.mark.parametrize("name", [MLP, BLOCK_ATTENTION])
def test_missing_inputs(name):
    model = composite_model(random_composite(np.random.default_rng(0), name, 16, 24), function=False)
    del model.graph.node[0].input[-1]
    with pytest.raises(Exception, match="input"):
        open_native(model)


def test_attention_takes_images_of_tokens_only():
    model = composite_model(random_composite(np.random.default_rng(0), BLOCK_ATTENTION, 16, 24), function=False)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.ClearField("shape")
    opened = open_native(model)
    for shape, message in [
        ((4, 16), "not \\[batch, tokens, in_features\\]"),
        ((1, 4, 15), "last dimension is not in_features"),
    ]:
        with pytest.raises(Exception, match=message):
            opened.run(None, {"x": np.ones(shape, np.float32)})
