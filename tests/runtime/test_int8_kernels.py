"""The native int8 operators: against exact integer sums on every instruction set, on special numbers and malformed models."""

import math
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from tests.runtime.int8_models import EPSILON, Int8Case, int8_model, random_case
from tests.runtime.sparse_models import replace_constant
from tests.runtime.test_native import open_native
from vitoats.format.operator import DENSE_INT8, INT8_OPERATORS, SPARSE_INT8
from vitoats.format.tiles import tiled, unpack, untiled
from vitoats.runtime import library

ISAS = library.available_isas()


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    monkeypatch.setenv(library.ISA_VARIABLE, request.param)
    return request.param


def run(case: Int8Case, x: np.ndarray, residual: np.ndarray | None = None, isa: str | None = None, threads: int = 1):
    with pytest.MonkeyPatch.context() as patch:
        if isa:
            patch.setenv(library.ISA_VARIABLE, isa)
        opened = open_native(int8_model(case), threads)
    return opened.run(None, {"x": x} | ({} if residual is None else {"residual": residual}))[0]


def full_range(case: Int8Case) -> Int8Case:
    """The case with -128, which the exporter never writes, among its weights."""
    for name, array in case.constants.items():
        if array.dtype == np.int8:
            case.constants[name] = np.where(array == -127, np.int8(-128), array)
    return case


def quantized(v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """q - zero as int64 and scale [..., 1] of rows, as docs/formats.md defines them: in float32."""
    low, high = (edge(v, axis=-1, keepdims=True, initial=0).astype(np.float32) for edge in (np.min, np.max))
    part = np.float32(1) / np.float32(255)
    scale = high * part - low * part
    inverse = 1 / np.where(scale > 0, scale, np.float32(1))
    zero = np.rint(-low * inverse)
    q = np.clip(np.rint(v * inverse) + zero, 0, 255)
    return np.where(scale > 0, q - zero, 0).astype(np.int64), scale


def expected(case: Int8Case, x: np.ndarray, residual: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """y [tokens, n] with exact integer sums, and the largest error that the rounding of float32 explains."""
    operator, constants, (n, k) = case.operator, case.constants, case.W.shape
    if operator.layer_norm:
        x = x.astype(np.float64)
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + EPSILON)
        x = (x * constants["norm_weight"] + constants["norm_bias"]).astype(np.float32)
    is_dense = operator.weights == DENSE_INT8
    S = untiled(constants["weight"], n, k) if is_dense else unpack(constants["values"], constants["mask"], n, k)
    q, x_scale = quantized(x)
    of_S = constants["scale"].astype(np.float64) * x_scale * (q @ S.T.astype(np.int64))
    y, size = of_S + constants["bias"], np.abs(of_S) + np.abs(constants["bias"]) + k * x_scale * np.abs(constants["scale"])
    tolerance = 1e-6 * size
    if operator.layer_norm:  # a few inputs may be rounded the other way
        tolerance = tolerance + 4 * 128 * x_scale * np.abs(constants["scale"])
    if not is_dense:
        parts, rank = constants["V_scale"].shape
        U, V = untiled(constants["U"], n, rank), untiled(constants["V"], rank, k)
        sums = np.einsum("tk,prk->tpr", q, V.astype(np.int64)).astype(np.float32)
        z, z_scale = quantized(sums * constants["V_scale"] * x_scale[:, None])
        of_part = np.einsum("tpr,pnr->tpn", z, U.reshape(parts, n // parts, rank).astype(np.int64)) * z_scale.astype(np.float64)
        of_U = of_part.reshape(-1, n) * constants["U_scale"]
        step = np.repeat(z_scale[..., 0], n // parts, axis=1) * np.abs(constants["U_scale"])
        y, tolerance = y + of_U, tolerance + 1e-6 * (np.abs(of_U) + rank * 128 * step)
        if operator.layer_norm:
            tolerance = tolerance + rank * 128 * step
    if operator.suffix == "Gelu":
        y, tolerance = y * (1 + np.vectorize(math.erf)(y / math.sqrt(2))) / 2, 1.2 * tolerance
    if residual is not None:
        y = y + residual
    return y, tolerance + 4e-6


@pytest.mark.parametrize("name", ISAS)
@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    operator=st.sampled_from(sorted(INT8_OPERATORS)),
    n=st.integers(1, 70),
    parts=st.integers(1, 3),
    k=st.integers(1, 300),
    rank=st.integers(1, 70),
    tokens=st.integers(1, 70),
    zeros=st.sampled_from([0.0, 0.5, 0.625, 0.9, 1.0]),
    special=st.sampled_from([None, np.inf, -np.inf, np.nan]),
    threads=st.sampled_from([1, 2]),
)
def test_outputs_are_those_of_exact_integer_sums(name, seed, operator, n, parts, k, rank, tokens, zeros, special, threads):
    """Any operator, shape, parts and rank. Tokens with an infinity or NaN have NaN in all outputs; no others change."""
    random = np.random.default_rng(seed)
    n = n if parts == 1 else parts * 16 * (1 + n // 32)
    case = full_range(random_case(random, operator, n, k, zeros, parts, rank))
    x = random.standard_normal((tokens, k), np.float32)
    x[random.random(tokens) < 0.1] = random.choice([0, 2.5])
    residual = random.standard_normal((1, tokens, n), np.float32) if case.operator.suffix == "Add" else None
    y, tolerance = expected(case, x, None if residual is None else residual[0])
    hit = np.flatnonzero((random.random(tokens) < 0.3) & (special is not None))
    x[hit, random.integers(k, size=len(hit))] = special
    found = run(case, x[None], residual, name, threads)[0]
    assert np.isnan(found[hit]).all()
    others = np.setdiff1d(np.arange(tokens), hit)
    assert np.all(np.abs(found - y)[others] <= tolerance[others])


def of_integers(random: np.random.Generator, name: str, n: int, k: int) -> Int8Case:
    """Weights with scales 1, bias 0 and no low-rank term: y is the sum of the products."""
    case = full_range(random_case(random, name, n, k))
    ones = {"scale": np.ones(n, np.float32), "bias": np.zeros(n, np.float32)}
    case.constants |= ones | ({"U": np.zeros_like(case.constants["U"])} if "U" in case.constants else {})
    return case


@pytest.mark.parametrize("operator", [SPARSE_INT8, DENSE_INT8])
@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 8, 9, 12, 23, 70, 110])
def test_sums_are_exact_to_the_last_bit(isa, operator, tokens):
    """Bytes of x, weights down to -128: nothing saturates and nothing is lost."""
    random = np.random.default_rng(tokens)
    case = of_integers(random, operator, 37, 500)
    x = random.integers(0, 256, (1, tokens, 500)).astype(np.float32)
    x[:, :, :2] = 0, 255  # scale 1 and zero point 0
    S = case.constants
    S = untiled(S["weight"], 37, 500) if operator == DENSE_INT8 else unpack(S["values"], S["mask"], 37, 500)
    assert np.array_equal(run(case, x), x.astype(np.int64) @ S.T.astype(np.int64))


@pytest.mark.parametrize("weight", [-128, 127])
@pytest.mark.parametrize("tokens", [1, 8, 40])
def test_the_largest_sums_do_not_overflow(isa, weight, tokens):
    case = of_integers(np.random.default_rng(0), DENSE_INT8, 16, 65_536)
    case.constants["weight"][:] = weight
    x = np.full((1, tokens, 65_536), 255, np.float32)
    assert np.array_equal(run(case, x), np.full((1, tokens, 16), np.float32(255 * 65_536 * weight)))


@pytest.mark.parametrize(
    "pair", [(64, 64), (64, 65), (127, 1), (127, 2), (-64, -64), (-64, -65), (-128, 0), (-128, -1), (127, -128)]
)
def test_two_products_do_not_saturate_at_16_bits(isa, pair):
    case = of_integers(np.random.default_rng(0), DENSE_INT8, 16, 600)
    weights = np.tile(np.array(pair, np.int8), (16, 300))
    case.constants["weight"] = tiled(weights)
    x = np.full((1, 17, 600), 255, np.float32)
    assert np.array_equal(run(case, x), x @ weights.T.astype(np.float32))


def test_tokens_of_zeros_give_the_bias(isa):
    case = random_case(np.random.default_rng(0), SPARSE_INT8, 48, 100, parts=3)
    for tokens in (1, 20):
        found = run(case, np.zeros((1, tokens, 100), np.float32))
        assert np.array_equal(found, np.broadcast_to(case.constants["bias"], found.shape))


def test_gelu_is_exact_to_two_millionths(isa):
    """Without weights, the outputs are the GELU of the biases. Small ones are relatively exact, too."""
    around_zero = np.geomspace(1e-30, 0.1, 2000)
    bias = np.concatenate([np.linspace(-9, 9, 18_001), around_zero, -around_zero, [30, -30, 1e30, -1e30]]).astype(np.float32)
    case = random_case(np.random.default_rng(0), "MatMulInt8Gelu", len(bias), 4)
    case.constants |= {"weight": np.zeros_like(case.constants["weight"]), "bias": bias}
    found = run(case, np.ones((1, 40, 4), np.float32))[0, -1].astype(np.float64)
    x = bias.astype(np.float64)
    expected = x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2
    small, usual = np.abs(x) <= 0.1, np.abs(x) < 10
    assert np.all(np.abs(found - expected)[usual] <= 2e-6)
    assert np.all(np.abs(found - expected)[small] <= 1e-4 * np.abs(expected[small]))
    assert np.all(np.abs(found - expected)[~usual] <= 1e-6 * np.abs(x[~usual]))


def test_no_tokens(isa):
    for name in (SPARSE_INT8, DENSE_INT8):
        assert run(random_case(np.random.default_rng(0), name, 5, 9), np.zeros((2, 0, 9), np.float32)).shape == (2, 0, 5)


def test_results_do_not_depend_on_threads_and_sessions(isa):
    """Few tokens and many; several sessions, of one thread to three, at once from several threads."""
    random = np.random.default_rng(0)
    case = random_case(random, "LayerNormSparseMatMulInt8Gelu", 510, 300, parts=1, rank=30)
    inputs = [random.standard_normal((2, tokens, 300), np.float32) for tokens in (1, 3, 150)]
    opened = [open_native(int8_model(case), threads) for threads in (1, 2, 3)]
    alone = [opened[0].run(None, {"x": x})[0] for x in inputs]
    assert np.array_equal(np.concatenate([opened[0].run(None, {"x": x[None]})[0] for x in inputs[2]]), alone[2])
    same = []

    def repeat(session):
        for _ in range(5):
            same.extend(np.array_equal(session.run(None, {"x": x})[0], y) for x, y in zip(inputs, alone, strict=True))

    threads = [threading.Thread(target=repeat, args=(session,)) for session in opened * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert same == [True] * 90


BROKEN = [
    # shapes
    ("SparseMatMulInt8", {"mask": np.zeros((1, 4, 8), np.uint8)}, r"the mask has shape \[1, 4, 8\], not \[2, 4, 8\]"),
    ("SparseMatMulInt8", {"mask": np.zeros((2, 32), np.uint8)}, r"the mask has shape \[2, 32\]"),
    ("SparseMatMulInt8", {"values": np.zeros((2, 3), np.int8)}, r"values have shape \[2, 3\], not \[nnz\]"),
    ("MatMulInt8", {"weight": np.zeros((2, 3, 16, 4), np.int8)}, r"weight has shape \[2, 3, 16, 4\], not \[2, 4, 16, 4\]"),
    ("MatMulInt8", {"scale": np.ones((2, 10), np.float32)}, r"scale has shape \[2, 10\], not \[out_features\]"),
    ("MatMulInt8", {"scale": np.ones(0, np.float32)}, r"scale has shape \[0\]"),
    ("MatMulInt8", {"bias": np.ones(19, np.float32)}, r"bias has shape \[19\], not \[20\]"),
    ("SparseMatMulInt8", {"U": np.zeros((2, 2, 16, 4), np.int8)}, r"U has shape \[2, 2, 16, 4\], not \[2, 1, 16, 4\]"),
    ("SparseMatMulInt8", {"U_scale": np.ones(19, np.float32)}, r"U_scale has shape \[19\], not \[20\]"),
    ("SparseMatMulInt8", {"V": np.zeros((1, 1, 3, 16, 4), np.int8)}, r"V has shape \[1, 1, 3, 16, 4\], not \[1, 1, 4, 16, 4\]"),
    ("SparseMatMulInt8", {"V_scale": np.ones((1, 0), np.float32)}, r"V_scale has shape \[1, 0\], not \[parts, rank\]"),
    ("SparseMatMulInt8", {"V_scale": np.ones(3, np.float32)}, r"V_scale has shape \[3\]"),
    ("SparseMatMulInt8", {"V_scale": np.ones((2, 3), np.float32)}, "20 outputs are not 2 equal parts of a multiple of 16"),
    ("LayerNormMatMulInt8", {"norm_weight": np.ones(16, np.float32)}, r"norm_weight has shape \[16\], not \[15\]"),
    ("LayerNormMatMulInt8", {"norm_bias": np.ones((1, 15), np.float32)}, r"norm_bias has shape \[1, 15\], not \[15\]"),
    # bits and values that disagree
    ("SparseMatMulInt8", {"values": np.zeros(1, np.int8)}, r"the mask has \d+ bits set for 1 values"),
    ("SparseMatMulInt8", {"mask": np.zeros((2, 4, 8), np.uint8)}, r"the mask has 0 bits set for \d+ values"),
    # numbers
    *[
        (name, {constant: np.full(shape, number, np.float32)}, f"a number of {constant} is infinite or NaN")
        for name, constant, shape, number in [
            ("MatMulInt8", "scale", 20, np.nan),
            ("SparseMatMulInt8", "bias", 20, np.inf),
            ("SparseMatMulInt8", "U_scale", 20, -np.inf),
            ("SparseMatMulInt8", "V_scale", (1, 3), np.nan),
            ("LayerNormMatMulInt8", "norm_weight", 15, np.inf),
            ("LayerNormMatMulInt8", "norm_bias", 15, np.nan),
        ]
    ],
    # types
    ("SparseMatMulInt8", {"values": np.zeros(3, np.uint8)}, "values is not int8|Type"),
    ("SparseMatMulInt8", {"mask": np.zeros((2, 4, 8), np.int8)}, "mask|Type"),
    ("MatMulInt8", {"weight": np.zeros((2, 4, 16, 4), np.float32)}, "weight is not int8|Type"),
    ("MatMulInt8", {"scale": np.ones(20, np.float64)}, "scale|Type"),
    ("SparseMatMulInt8", {"V_scale": np.ones((1, 3), np.float16)}, "V_scale|Type"),
]


def small_model(name: str):
    return int8_model(random_case(np.random.default_rng(0), name, 20, 15), function=False)


@pytest.mark.parametrize(("name", "constants", "message"), BROKEN)
def test_a_malformed_model_is_an_error_of_the_session(name, constants, message):
    model = small_model(name)
    for constant, array in constants.items():
        replace_constant(model, constant, array)
    with pytest.raises(Exception, match=message):
        open_native(model)


@pytest.mark.parametrize("in_features", [0, -1, 12, 17, 65_537, 2**31, 2**63 - 1])
@pytest.mark.parametrize("name", [SPARSE_INT8, DENSE_INT8])
def test_impossible_in_features(name, in_features):
    model = small_model(name)
    model.graph.node[0].attribute[0].i = in_features
    with pytest.raises(Exception, match=r"in_features|shape"):
        open_native(model)


@pytest.mark.parametrize("epsilon", [-1e-6, np.nan, np.inf])
def test_impossible_epsilon(epsilon):
    model = small_model("LayerNormMatMulInt8")
    next(a for a in model.graph.node[0].attribute if a.name == "epsilon").f = epsilon
    with pytest.raises(Exception, match="epsilon"):
        open_native(model)


@pytest.mark.parametrize("name", ["MatMulInt8", "LayerNormSparseMatMulInt8", "SparseMatMulInt8Add"])
def test_missing_inputs(name):
    model = small_model(name)
    del model.graph.node[0].input[-1]
    with pytest.raises(Exception, match="input"):
        open_native(model)


@pytest.mark.parametrize("constant", ["values", "mask", "scale", "bias", "U", "U_scale", "V", "V_scale"])
def test_weights_must_be_constants(constant):
    model = small_model(SPARSE_INT8)
    tensor = next(t for t in model.graph.initializer if t.name == constant)
    model.graph.input.append(helper.make_tensor_value_info(constant, tensor.data_type, list(tensor.dims)))
    model.graph.initializer.remove(tensor)
    with pytest.raises(Exception, match=f"{constant} is not a constant"):
        open_native(model)


def test_a_wrong_x_or_residual_is_an_error_of_the_run():
    model = small_model("MatMulInt8Add")
    for value in model.graph.input:  # ONNX Runtime checks less without shapes
        value.type.CopyFrom(helper.make_tensor_type_proto(TensorProto.FLOAT, None))
    opened = open_native(model)
    x, residual = np.ones((1, 4, 15), np.float32), np.ones((1, 4, 20), np.float32)
    assert opened.run(None, {"x": x, "residual": residual})[0].shape == (1, 4, 20)
    with pytest.raises(Exception, match="last dimension is not in_features"):
        opened.run(None, {"x": x[..., :14], "residual": residual})
    for wrong in (residual[:, :3], residual[..., :19], residual[0]):
        with pytest.raises(Exception, match="residual has shape"):
            opened.run(None, {"x": x, "residual": wrong})
