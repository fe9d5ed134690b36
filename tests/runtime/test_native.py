"""The native operator: against float64 algebra on every instruction set, on malformed models, from many threads."""

import threading

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from tests.runtime.sparse_models import operator_model, random_low_rank, random_sparse, replace_constant
from vitoats.common.errors import InputError
from vitoats.format.operator import INPUTS
from vitoats.runtime import library

ISAS = library.available_isas()


def open_native(model, threads: int = 1) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    assert library.register(options)
    with library.Watch() as watch:
        opened = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    assert watch.nodes == ["layer"]
    return opened


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    monkeypatch.setenv(library.ISA_VARIABLE, request.param)
    assert library.isa() == request.param
    return request.param


def expected_product(x, S, bias=None, low_rank=None):
    """y and, for each y, the sum of its terms' sizes, in float64."""
    x, S = x.astype(np.float64), S.astype(np.float64)
    y, size = x @ S.T, np.abs(x) @ np.abs(S.T)
    if bias is not None:
        y, size = y + bias, size + np.abs(bias)
    if low_rank is not None:
        U, V = (term.astype(np.float64) for term in low_rank)
        y = y + x @ (U @ V).reshape(S.shape).T
        size = size + np.abs(x) @ (np.abs(U) @ np.abs(V)).reshape(S.shape).T
    return y, size


@pytest.mark.parametrize("name", ISAS)
@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 50),
    parts=st.integers(1, 3),
    rank=st.none() | st.integers(0, 70),
    k=st.integers(1, 200),
    tokens=st.integers(0, 140),
    batch=st.integers(1, 3),
    zeros=st.sampled_from([0.0, 0.3, 0.5, 0.625, 0.9, 1.0]),
    value_type=st.sampled_from([np.float32, np.float16]),
    has_bias=st.booleans(),
    threads=st.sampled_from([1, 2]),
)
def test_product_is_that_of_float64_algebra(name, seed, n, parts, rank, k, tokens, batch, zeros, value_type, has_bias, threads):
    """Any number of tokens from none on, any N, K and rank, any density down to nothing; both regimes."""
    random = np.random.default_rng(seed)
    n *= parts
    S = random_sparse(random, n, k, zeros, value_type)
    x = random.standard_normal((batch, tokens, k), np.float32)
    bias = random.standard_normal(n, np.float32) if has_bias else None
    low_rank = None if rank is None else random_low_rank(random, n, k, parts, rank, value_type)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(library.ISA_VARIABLE, name)
        opened = open_native(operator_model(S, value_type, bias, low_rank), threads)
    found = opened.run(None, {"x": x})[0]
    y, size = expected_product(x, S, bias, low_rank)
    assert found.shape == y.shape
    assert np.all(np.abs(found - y) <= 1e-5 * size + 1e-30)


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 50, 197, 400])
def test_every_number_of_tokens_that_matters(isa, tokens):
    random = np.random.default_rng(tokens)
    S, low_rank = random_sparse(random, 201, 330, 0.6), random_low_rank(random, 201, 330, 3, 13)
    x = random.standard_normal((1, tokens, 330), np.float32)
    y, size = expected_product(x, S, None, low_rank)
    assert np.all(np.abs(open_native(operator_model(S, low_rank=low_rank)).run(None, {"x": x})[0] - y) <= 1e-5 * size)


def test_many_tokens_in_several_chunks(isa):
    """48 MB of activations go through the scratch memory in pieces; each knows its own tokens with NaN."""
    random = np.random.default_rng(0)
    n, k, tokens = 24, 3000, 4000
    S, low_rank = random_sparse(random, n, k, 0.6), random_low_rank(random, n, k, 3, 5)
    bias = random.standard_normal(n, np.float32)
    x = random.standard_normal((1, tokens, k), np.float32)
    hit = [0, 7, 1500, 2999, tokens - 1]
    opened = open_native(operator_model(S, bias=bias, low_rank=low_rank), threads=2)
    y, size = expected_product(x, S, bias, low_rank)
    x[0, hit, random.integers(k, size=len(hit))] = np.nan
    found = opened.run(None, {"x": x})[0]
    assert np.array_equal(np.isnan(found).any(-1)[0].nonzero()[0], hit)
    assert np.isnan(found[0, hit]).all()
    rest = np.delete(np.arange(tokens), hit)
    assert np.all(np.abs(found - y)[0, rest] <= 1e-5 * size[0, rest])


def test_as_many_parts_as_rows(isa):
    """U and V have a row and a rank for each output; z is larger than x, and tiles are narrower for it."""
    random = np.random.default_rng(0)
    n, k = 60_000, 3
    S, low_rank = random_sparse(random, n, k, 0.5), random_low_rank(random, n, k, n, 1)
    opened = open_native(operator_model(S, low_rank=low_rank, function=False))
    for tokens in (1, 5, 70):
        x = random.standard_normal((1, tokens, k), np.float32)
        y, size = expected_product(x, S, None, low_rank)
        assert np.all(np.abs(opened.run(None, {"x": x})[0] - y) <= 1e-5 * size + 1e-30)


def test_no_tokens_in_large_dimensions(isa):
    S = random_sparse(np.random.default_rng(0), 5, 12, 0.5)
    model = operator_model(S, function=False)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.ClearField("shape")
    opened = open_native(model)
    for shape in [(0, 2**50), (2**30, 2**20, 0), (0,)]:
        assert opened.run(None, {"x": np.zeros((*shape, 12), np.float32)})[0].shape == (*shape, 5)


def test_all_float16_numbers(isa):
    """Subnormal and largest numbers too, each as the only value of its row."""
    bits = np.arange(2**16, dtype=np.uint16)
    numbers = bits.view(np.float16)
    numbers = numbers[np.isfinite(numbers) & (numbers != 0)]
    model = operator_model(numbers.astype(np.float32)[:, None], np.float16)
    for tokens in (1, 20):  # one for each regime
        found = open_native(model).run(None, {"x": np.ones((1, tokens, 1), np.float32)})[0]
        assert np.array_equal(found, np.broadcast_to(numbers.astype(np.float32), found.shape))


def test_all_float16_numbers_in_the_low_rank_term(isa):
    """In U with V = 1, and in V with U = 1 and an identity for x."""
    numbers = np.arange(2**16, dtype=np.uint16).view(np.float16)
    numbers = numbers[np.isfinite(numbers)].astype(np.float32)
    ones, k = np.ones((1, 1, 1), np.float32), 512
    in_U = operator_model(np.zeros((len(numbers), 1), np.float32), np.float16, low_rank=(numbers[None, :, None], ones))
    rows = numbers.reshape(-1, 1, k)  # [124, 1, 512]: a part for each
    in_V = operator_model(np.zeros((len(rows), k), np.float32), np.float16, low_rank=(np.ones((len(rows), 1, 1)), rows))
    for tokens in (1, 20):
        found = open_native(in_U).run(None, {"x": np.ones((1, tokens, 1), np.float32)})[0]
        assert np.array_equal(found, np.broadcast_to(numbers, found.shape))
    opened, identity = open_native(in_V), np.eye(k, dtype=np.float32)[None]
    few = [opened.run(None, {"x": identity[:, i : i + 8]})[0] for i in range(0, k, 8)]
    for found in (np.concatenate(few, axis=1), opened.run(None, {"x": identity})[0]):
        assert np.array_equal(found[0], rows[:, 0].T)


def test_threads_change_nothing(isa):
    """The order of summation is that of one thread."""
    random = np.random.default_rng(0)
    model = operator_model(random_sparse(random, 510, 300, 0.5), low_rank=random_low_rank(random, 510, 300, 3, 30))
    for tokens in (3, 150):
        x = random.standard_normal((2, tokens, 300), np.float32)
        one, two = (open_native(model, threads).run(None, {"x": x})[0] for threads in (1, 2))
        assert np.array_equal(one, two)


@pytest.mark.parametrize("name", ISAS)
@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    tokens=st.integers(1, 40),
    n=st.integers(1, 40),
    k=st.integers(1, 150),
    parts=st.integers(1, 3),
    rank=st.none() | st.integers(0, 20),
    zeros=st.sampled_from([0.0, 0.6, 1.0]),
    special=st.sampled_from([np.inf, -np.inf, np.nan]),
)
def test_a_token_with_infinity_or_nan_has_nan_in_all_outputs(name, seed, tokens, n, k, parts, rank, zeros, special):
    """Where S is zero, too; other tokens are as if it were not there. The file's own function is finite in the same places."""
    random = np.random.default_rng(seed)
    n *= parts
    S = random_sparse(random, n, k, zeros)
    model = operator_model(S, low_rank=None if rank is None else random_low_rank(random, n, k, parts, rank))
    x = random.standard_normal((1, tokens, k), np.float32)
    hit = random.random(tokens) < 0.4
    y = x.copy()
    y[0, hit, random.integers(k, size=hit.sum())] = special
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(library.ISA_VARIABLE, name)
        opened = open_native(model)
    clean, found = (opened.run(None, {"x": batch})[0][0] for batch in (x, y))
    assert np.isnan(found[hit]).all()
    assert np.array_equal(found[~hit], clean[~hit])
    stock = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": y})[0][0]
    assert np.array_equal(np.isfinite(found), np.isfinite(stock))


@pytest.mark.parametrize("tokens", [1, 8, 9, 50])
def test_subnormal_numbers_count_as_zero(isa, tokens):
    """In x, in the weights and in their products; numpy's arithmetic in the same thread keeps them."""
    tiny = np.float32(1e-40)
    S = np.array([[1.0, 0.0], [tiny, 2.0], [1e-30, 0.0]], np.float32)
    low_rank = np.array([[[tiny], [1.0], [0.0]]], np.float32), np.array([[[1.0, tiny]]], np.float32)
    opened = open_native(operator_model(S, low_rank=low_rank))
    for x, y in [((tiny, 1), (0, 2, 0)), ((1, tiny), (1, 1, 1e-30)), ((1e-15, 3), (1e-15, 6, 0))]:
        found = opened.run(None, {"x": np.full((1, tokens, 2), x, np.float32)})[0]
        assert np.array_equal(found, np.broadcast_to(np.array(y, np.float32), found.shape))
        assert tiny * np.float32(2) > 0


def test_the_shape_is_inferred_without_help():
    S = random_sparse(np.random.default_rng(0), 7, 12, 0.5)
    model = operator_model(S, function=False)
    del model.graph.output[0].type.tensor_type.shape.dim[:]
    model.graph.output[0].type.tensor_type.ClearField("shape")
    assert open_native(model).get_outputs()[0].shape == ["b", "t", 7]


TWO_IN_A_ROW = np.zeros((3, 10), np.float32)
TWO_IN_A_ROW[:, [1, 8]] = 1


def broken(**constants):
    """A sound model of S [3, 10] with 6 values, rank 2, and the given constants instead."""
    low_rank = np.zeros((1, 3, 2), np.float32), np.zeros((1, 2, 10), np.float32)
    model = operator_model(TWO_IN_A_ROW, bias=np.zeros(3, np.float32), low_rank=low_rank, function=False)
    for name, array in constants.items():
        replace_constant(model, name, array)
    return model


MASK = np.array([[2, 1]] * 3, np.uint8)

BROKEN_CONSTANTS = [
    # sizes that disagree
    ({"values": np.ones(5, np.float32)}, "6 bits set for 5 values"),
    ({"values": np.ones(7, np.float32)}, "6 bits set for 7 values"),
    ({"mask": MASK[:2]}, "4 bits set for 6 values"),
    ({"mask": np.hstack([MASK, MASK])}, r"shape \[3, 4\], not \[out_features, 2\]"),
    ({"mask": MASK[:, :1]}, r"shape \[3, 1\], not \[out_features, 2\]"),
    ({"bias": np.zeros(4, np.float32)}, r"bias has shape \[4\], not \[3\]"),
    ({"U": np.zeros((1, 2, 2), np.float32)}, r"U has shape \[1, 2, 2\], not \[parts, 3 / parts, rank\]"),
    ({"U": np.zeros((3, 3, 2), np.float32)}, r"U has shape \[3, 3, 2\]"),
    ({"U": np.zeros((2, 1, 2), np.float32)}, r"U has shape \[2, 1, 2\]"),
    ({"U": np.zeros((0, 3, 2), np.float32)}, r"U has shape \[0, 3, 2\]"),
    ({"U": np.zeros((3, 2), np.float32)}, r"U has shape \[3, 2\]"),
    ({"U": np.zeros((3, 1, 2), np.float32)}, r"V has shape \[1, 2, 10\], not \[3, 2, 10\]"),
    ({"U": np.zeros((1, 3, 0), np.float32)}, r"V has shape \[1, 2, 10\], not \[1, 0, 10\]"),
    ({"V": np.zeros((1, 2, 9), np.float32)}, r"V has shape \[1, 2, 9\], not \[1, 2, 10\]"),
    ({"V": np.zeros((2, 10), np.float32)}, r"V has shape \[2, 10\]"),
    # stray bits: columns 10 to 15 do not exist
    ({"mask": np.array([[2, 1], [2, 1], [2, 4]], np.uint8)}, "bit past the last column"),
    ({"mask": np.full((3, 2), 255, np.uint8)}, "bit past the last column"),
    # dimensions
    ({"values": np.ones((2, 3), np.float32)}, r"values have shape \[2, 3\]"),
    ({"mask": MASK.ravel()}, r"shape \[6\]"),
    ({"mask": np.zeros((0, 2), np.uint8), "values": np.zeros(0, np.float32)}, r"shape \[0, 2\]"),
    ({"values": np.zeros(0, np.float32)}, "6 bits set for 0 values"),
    # numbers
    ({"values": np.array([1, 1, 1, np.nan, 1, 1], np.float32)}, "infinite or NaN"),
    ({"values": np.array([1, 1, 1, -np.inf, 1, 1], np.float16)}, "infinite or NaN"),
    ({"U": np.full((1, 3, 2), np.inf, np.float32)}, "U is infinite or NaN"),
    ({"V": np.full((1, 2, 10), np.nan, np.float32)}, "V is infinite or NaN"),
    ({"bias": np.array([0, np.nan, 0], np.float32)}, "bias is infinite or NaN"),
    ({"bias": np.array([0, 0, -np.inf], np.float32)}, "bias is infinite or NaN"),
    # types
    ({"values": np.ones(6, np.float64)}, "neither float nor float16"),
    ({"values": np.ones(6, np.int32)}, "neither float nor float16"),
    ({"mask": MASK.astype(np.int8)}, "mask|type"),
    ({"bias": np.zeros(3, np.float64)}, "bias|type"),
    ({"values": np.ones(6, np.float16)}, "U and V are not of the type of values"),
    ({"V": np.zeros((1, 2, 10), np.float16)}, "U and V are not of the type of values"),
]


@pytest.mark.parametrize(("constants", "message"), BROKEN_CONSTANTS)
def test_a_malformed_model_is_an_error_of_the_session(constants, message):
    with pytest.raises(Exception, match=message):
        open_native(broken(**constants))


@pytest.mark.parametrize("in_features", [0, -1, -(2**63), 1, 8, 17, 2**31, 2**62, 2**63 - 1])
def test_impossible_in_features(in_features):
    model = broken()
    model.graph.node[0].attribute[0].i = in_features
    with pytest.raises(Exception, match="in_features"):
        open_native(model)


@pytest.mark.parametrize("in_features", [9, 11, 16])
def test_in_features_that_fits_the_mask_but_not_x(in_features):
    """Whether x fits is known when it comes."""
    model = operator_model(TWO_IN_A_ROW, function=False)
    model.graph.node[0].attribute[0].i = in_features
    opened = open_native(model)
    with pytest.raises(Exception, match="last dimension is not in_features"):
        opened.run(None, {"x": np.zeros((1, 4, 10), np.float32)})


def test_in_features_must_be_an_integer():
    for attributes in ({}, {"in_features": 2.0}, {"in_features": "2"}, {"in_features": [2]}):
        model = broken()
        node = helper.make_node("SparseMatMul", list(INPUTS), ["y"], name="layer", domain="vitoats", **attributes)
        model.graph.node[0].CopyFrom(node)
        with pytest.raises(Exception, match="in_features"):
            open_native(model)


@pytest.mark.parametrize("name", ["values", "mask", "U", "V"])
def test_weights_must_be_constants(name):
    model = broken()
    tensor = next(t for t in model.graph.initializer if t.name == name)
    model.graph.input.append(helper.make_tensor_value_info(name, tensor.data_type, list(tensor.dims)))
    model.graph.initializer.remove(tensor)
    with pytest.raises(Exception, match=f"{name} is not a constant"):
        open_native(model)


def test_a_wrong_x_is_an_error_of_the_run():
    model = broken()
    del model.graph.input[0].type.tensor_type.shape.dim[:]  # ONNX Runtime checks less then
    model.graph.input[0].type.tensor_type.ClearField("shape")
    opened = open_native(model)
    for shape in [(1, 4, 9), (1, 4, 11), (10, 1), ()]:
        with pytest.raises(Exception, match="last dimension is not in_features"):
            opened.run(None, {"x": np.zeros(shape, np.float32)})
    assert opened.run(None, {"x": np.ones(10, np.float32)})[0].tolist() == [2, 2, 2]


@pytest.mark.parametrize("inputs", [["", "U"], ["bias", "U"], ["bias", "U", ""], ["bias", "", "V"]])
def test_both_factors_or_none(inputs):
    model = broken()
    model.graph.node[0].input[3:] = inputs
    with pytest.raises(Exception, match=r"U without V|(U|V) is not a constant"):
        open_native(model)


def test_the_bias_may_be_left_out_before_the_factors():
    model = broken(U=np.ones((1, 3, 2), np.float32), V=np.ones((1, 2, 10), np.float32))
    model.graph.node[0].input[3] = ""
    for tokens in (1, 20):
        found = open_native(model).run(None, {"x": np.ones((1, tokens, 10), np.float32)})[0]
        assert np.array_equal(found, np.full((1, tokens, 3), 22))  # two non-zeros, and rank 2 over 10 inputs


@pytest.mark.parametrize("name", ["sse9", "AVX2", " "])
def test_an_unknown_instruction_set_is_refused(monkeypatch, name):
    monkeypatch.setenv(library.ISA_VARIABLE, name)
    with pytest.raises(InputError, match="portable"):
        library.register(ort.SessionOptions())


def test_many_sessions_and_threads_at_once():
    random = np.random.default_rng(0)
    work = []
    for n, k, tokens in [(40, 70, 1), (130, 64, 7), (64, 300, 30), (200, 100, 120)]:
        S = random_sparse(random, n, k, 0.6)
        x = random.standard_normal((1, tokens, k), np.float32)
        work.append((operator_model(S), x, x @ S.T))
    failures = []

    def run(turn: int) -> None:
        for i in range(12):
            model, x, expected = work[(turn + i) % len(work)]
            opened = open_native(model, threads=1 + turn % 2) if i % 3 == 0 else shared[(turn + i) % len(work)]
            if not np.allclose(opened.run(None, {"x": x})[0], expected, atol=1e-4):
                failures.append((turn, i))

    shared = [open_native(model, threads=2) for model, _, _ in work]
    threads = [threading.Thread(target=run, args=(turn,)) for turn in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_the_peak_is_a_plausible_number():
    assert 0.5 < library.fma_peak_gflops(seconds=0.05) < 1000
