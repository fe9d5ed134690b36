"""Numbers that are not those of every day, in the int8 operators: one defined result, on all instruction sets alike."""

import numpy as np
import pytest

from tests.runtime.int8_models import Int8Case, random_case
from tests.runtime.test_int8_kernels import expected, run
from vitoats.format.operator import DENSE_INT8, INT8_OPERATORS, SPARSE_INT8
from vitoats.runtime import library

ISAS = library.available_isas()
N, K = 48, 70
TOKENS = {
    "zeros": np.zeros(K),
    "negative zeros": np.full(K, -0.0),
    "one value": np.full(K, 2.5),
    "one negative value": np.full(K, -0.1),
    "one number": np.eye(K)[3],
    "subnormal": np.full(K, 1e-40),
    "small": np.linspace(-1e-30, 1e-30, K),
    "large": np.linspace(-1e30, 1e30, K),
    "infinity": np.where(np.arange(K) == 69, np.inf, 1.0),
    "minus infinity": np.where(np.arange(K) == 0, -np.inf, 1.0),
    "both infinities": np.where(np.arange(K) < 2, [np.inf, -np.inf] * (K // 2), 0.0),
    "NaN": np.where(np.arange(K) == 33, np.nan, 1.0),
    "all NaN": np.full(K, np.nan),
}
SPECIAL = np.array([not np.isfinite(row).all() for row in TOKENS.values()])


def tokens(random: np.random.Generator, repeated: int) -> np.ndarray:
    """All of them among ordinary ones, in an order that differs: [tokens, K], the rows of TOKENS first."""
    rows = [*TOKENS.values(), *random.standard_normal((repeated, K))]
    return np.array(rows, np.float32)


@pytest.mark.parametrize("others", [0, 40])
@pytest.mark.parametrize("name", sorted(INT8_OPERATORS))
def test_special_tokens_have_the_same_result_on_all_instruction_sets(name, others):
    """Infinities and NaN give NaN in their own token alone, also beside a residual; zeros give what the bias does."""
    random = np.random.default_rng(len(name) + others)
    case = random_case(random, name, N, K, 0.5, 3, 5)
    x = tokens(random, others)
    order = random.permutation(len(x))
    residual = random.standard_normal((1, len(x), N), np.float32) if case.operator.suffix == "Add" else None
    arguments = x[order][None], None if residual is None else residual[:, order]
    results = {isa: run(case, *arguments, isa)[0][np.argsort(order)] for isa in ISAS}
    special = np.append(SPECIAL, np.zeros(others, bool))
    usual = results["portable"][~special]
    for isa, found in results.items():
        assert np.isnan(found[special]).all(), isa
        assert np.isfinite(found[~special]).all(), isa
        assert np.all(np.abs(found[~special] - usual) <= 1e-4 * np.abs(usual).max(1, keepdims=True)), isa


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("count", [1, 20])
def test_tokens_without_a_number_give_the_bias(isa, count):
    """Zeros of either sign, and subnormal numbers, which count as zero."""
    case = random_case(np.random.default_rng(0), SPARSE_INT8, N, K, parts=3)
    for kind in ("zeros", "negative zeros", "subnormal"):
        found = run(case, np.tile(TOKENS[kind].astype(np.float32), (1, count, 1)), isa=isa)
        assert np.array_equal(found, np.broadcast_to(case.constants["bias"], found.shape)), kind


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("suffix", ["", "Gelu"])
def test_a_norm_of_one_value_gives_its_bias(isa, suffix):
    """Nothing varies, so what is multiplied is norm_bias, whatever norm_weight is; epsilon keeps the division finite."""
    random = np.random.default_rng(0)
    case = random_case(random, f"LayerNorm{DENSE_INT8}{suffix}", N, K)
    x = np.full((1, 9, K), 2.5, np.float32)
    case.constants["norm_bias"] = np.zeros(K, np.float32)
    found = run(case, x, isa=isa)
    y = case.constants["bias"].astype(np.float64)
    assert np.abs(found - case.expected(x)).max() < 1e-5
    assert suffix or np.array_equal(found, np.broadcast_to(y.astype(np.float32), found.shape))


def with_scales(case: Int8Case, name: str, number: float) -> Int8Case:
    """Every second one of these scales is that number."""
    scales = case.constants[name].copy()
    scales.flat[::2] = number
    case.constants[name] = scales
    return case


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("number", [0.0, -0.0, -0.01])
@pytest.mark.parametrize("name", ["scale", "U_scale", "V_scale"])
def test_scales_of_any_sign_and_of_zero_are_numbers_like_others(isa, name, number):
    random = np.random.default_rng(0)
    case = with_scales(random_case(random, SPARSE_INT8, N, K, 0.5, 3, 7), name, number)
    for count in (1, 30):
        x = random.standard_normal((count, K), np.float32)
        y, tolerance = expected(case, x, None)
        assert np.all(np.abs(run(case, x[None], isa=isa)[0] - y) <= tolerance)


@pytest.mark.parametrize("isa", ISAS)
def test_weights_and_scales_of_zero_give_the_bias(isa):
    random = np.random.default_rng(0)
    for name, constant in ((SPARSE_INT8, "scale"), (DENSE_INT8, "scale"), (DENSE_INT8, "weight")):
        case = random_case(random, name, N, K, 0.5)
        case.constants[constant] = np.zeros_like(case.constants[constant])
        if "U" in case.constants:
            case.constants["U"] = np.zeros_like(case.constants["U"])
        found = run(case, random.standard_normal((1, 30, K), np.float32), isa=isa)
        assert np.array_equal(found, np.broadcast_to(case.constants["bias"], found.shape))
