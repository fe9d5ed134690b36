"""Makes sessions of mutated models with a given build of the native library: python fuzz_native.py LIBRARY CASES SEED

Each model is a sound one of one operator with one to three mutations. A session may be refused with an error, or made. Then it
is run, on one thread and on two, and both must give the same numbers. Anything else ends the process, and with a library under
sanitizers so does any access out of bounds. The last line counts the outcomes.
"""

import random
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from tests.runtime.int8_models import attention_model, composite_model, int8_model, random_case, random_composite
from tests.runtime.sparse_models import operator_model, random_low_rank, random_sparse
from vitoats.format.operator import COMPOSITES, DOMAIN, INT8_OPERATORS

SIZES = (0, 1, 2, 7, 8, 9, 63, 64, 65, 255, 2**16, 2**31 - 1, 2**31, 2**62, 2**63 - 1, -1, -8, -(2**63))
NUMBERS = (0.0, -0.0, 1e-40, 1e-6, -1e-6, -1.0, 3e38, -3e38, float("inf"), -float("inf"), float("nan"))
TYPES = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.UINT8, TensorProto.INT8, TensorProto.DOUBLE, TensorProto.BOOL)
WIDTHS = {TensorProto.FLOAT: 4, TensorProto.FLOAT16: 2, TensorProto.DOUBLE: 8}  # bytes; others have 1


def tensor(model: onnx.ModelProto, dice: random.Random) -> onnx.TensorProto:
    """One of the constants; an empty one, of no model, where there is none."""
    return dice.choice(list(model.graph.initializer) or [onnx.TensorProto()])


# ---- constants


def flip_bits(model, dice):
    chosen = tensor(model, dice)
    data = bytearray(chosen.raw_data)
    for _ in range(dice.randint(1, 4) if data else 0):
        data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    chosen.raw_data = bytes(data)


def cut_data(model, dice):
    chosen = tensor(model, dice)
    chosen.raw_data = chosen.raw_data[: dice.randint(0, len(chosen.raw_data))]


def grow_data(model, dice):
    tensor(model, dice).raw_data += dice.randbytes(dice.choice((1, 4, 64)))


def resize(model, dice):
    """Other sizes, with data to match."""
    chosen = tensor(model, dice)
    shape = [dice.choice(SIZES[:9]) for _ in range(dice.randint(0, 3))]
    chosen.dims[:] = shape
    chosen.raw_data = dice.randbytes(WIDTHS.get(chosen.data_type, 1) * int(np.prod(shape, dtype=np.int64)))


def resize_one(model, dice):
    """One size a little larger or smaller, with data to match: a strip or a quad too many or too few, say."""
    chosen = tensor(model, dice)
    if not chosen.dims:
        return
    axis = dice.randrange(len(chosen.dims))
    shape = list(chosen.dims)
    shape[axis] = max(0, shape[axis] + dice.choice((-1, 1)))
    if 0 <= int(np.prod(shape, dtype=np.int64)) <= 10**6 and min(shape) >= 0:
        chosen.dims[:] = shape
        chosen.raw_data = dice.randbytes(WIDTHS.get(chosen.data_type, 1) * int(np.prod(shape, dtype=np.int64)))


def lie_about_sizes(model, dice):
    chosen = tensor(model, dice)
    if chosen.dims:
        chosen.dims[dice.randrange(len(chosen.dims))] = dice.choice(SIZES)
    else:
        chosen.dims.append(dice.choice(SIZES))


def lie_about_type(model, dice):
    tensor(model, dice).data_type = dice.choice(TYPES)


def other_type(model, dice):
    """Another type, with data to match."""
    chosen = tensor(model, dice)
    length = len(chosen.raw_data) // WIDTHS.get(chosen.data_type, 1)
    chosen.data_type = dice.choice(TYPES)
    chosen.raw_data = bytes(length * WIDTHS.get(chosen.data_type, 1))


def not_finite(model, dice):
    """An infinity or NaN among the numbers, of either width."""
    chosen = tensor(model, dice)
    pattern = {TensorProto.FLOAT: b"\x00\x00\x80\x7f", TensorProto.FLOAT16: b"\x01\x7c"}.get(chosen.data_type, b"\xff")
    data = bytearray(chosen.raw_data)
    if len(data) >= len(pattern):
        at = dice.randrange(len(data) // len(pattern)) * len(pattern)
        data[at : at + len(pattern)] = pattern
    chosen.raw_data = bytes(data)


def extreme_scales(model, dice):
    """Zero, negative, subnormal or huge numbers in one of the scales."""
    scales = [t for t in model.graph.initializer if t.name.endswith("scale") and len(t.raw_data) >= 4]
    if not scales:
        return
    chosen = dice.choice(scales)
    numbers = np.frombuffer(chosen.raw_data[: len(chosen.raw_data) // 4 * 4], np.float32).copy()
    numbers[dice.randrange(numbers.size) if dice.random() < 0.5 else slice(None)] = dice.choice(NUMBERS)
    chosen.raw_data = numbers.tobytes()


def other_parts(model, dice):
    """Zeros for U and V, cut into parts and ranks in another way, which may be a sound one."""
    constants = {t.name: t for t in model.graph.initializer}
    if "V_scale" in constants:
        return other_int8_parts(constants, dice)
    if not {"U", "V"} <= constants.keys() or len(constants["U"].dims) != 3 or len(constants["V"].dims) != 3:
        return
    n, k = constants["U"].dims[0] * constants["U"].dims[1], constants["V"].dims[2]
    if n < 1 or k < 1 or n * k > 10**6:  # sizes that another mutation made up
        return
    parts, rank = dice.choice([p for p in range(1, n + 1) if n % p == 0]), dice.choice((0, 1, 5))
    fill(constants["U"], (parts, n // parts, rank))
    fill(constants["V"], (parts, rank, k))


def other_int8_parts(constants: dict[str, onnx.TensorProto], dice: random.Random) -> None:
    mask, scale = constants["mask"].dims, constants["scale"].dims
    if len(mask) != 3 or len(scale) != 1 or not (0 < mask[0] * mask[1] < 10**4 and 0 < scale[0] < 10**4):
        return
    parts, rank = dice.choice((1, 2, 3, 5, mask[0])), dice.choice((0, 1, 5, 17))
    fill(constants["U"], (mask[0], -(-rank // 4), 16, 4))
    fill(constants["V"], (parts, -(-rank // 16), mask[1], 16, 4))
    fill(constants["V_scale"], (parts, rank))


def fill(constant: onnx.TensorProto, shape: tuple[int, ...]) -> None:
    """Zeros of that shape."""
    constant.dims[:] = shape
    constant.raw_data = bytes(WIDTHS.get(constant.data_type, 1) * int(np.prod(shape, dtype=np.int64)))


# ---- the node and the model


def other_attribute(model, dice):
    if not model.graph.node[0].attribute:
        return
    chosen = dice.choice(list(model.graph.node[0].attribute))
    if dice.random() < 0.2:
        chosen.type = dice.choice((onnx.AttributeProto.INT, onnx.AttributeProto.FLOAT, onnx.AttributeProto.INTS))
    chosen.i, chosen.f = dice.choice(SIZES), dice.choice(NUMBERS)


def no_attribute(model, dice):
    attributes = model.graph.node[0].attribute
    if attributes:
        del attributes[dice.randrange(len(attributes))]


def no_attributes(model, dice):
    del model.graph.node[0].attribute[:]


def other_inputs(model, dice):
    inputs = model.graph.node[0].input
    if inputs:
        inputs[dice.randrange(len(inputs))] = dice.choice([*inputs, ""])


def fewer_inputs(model, dice):
    inputs = model.graph.node[0].input
    del inputs[dice.randint(0, len(inputs)) :]


def more_inputs(model, dice):
    model.graph.node[0].input.extend(dice.choices(["", *model.graph.node[0].input], k=dice.randint(1, 3)))


def other_operator(model, dice):
    model.graph.node[0].op_type = dice.choice(("SparseMatMul", "QKVAttention", "None", *INT8_OPERATORS, *COMPOSITES))


def unknown_shapes(model, dice):
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.ClearField("shape")


def other_input_type(model, dice):
    dice.choice(list(model.graph.input)).type.tensor_type.elem_type = dice.choice(TYPES)


def other_version(model, dice):
    for opset in model.opset_import:
        if opset.domain == DOMAIN:
            opset.version = dice.choice((0, 1, 2, 3, 100, 2**31 - 1, 2**31, 2**62, -1))


MUTATIONS: list[Callable] = [
    flip_bits, cut_data, grow_data, resize, resize_one, lie_about_sizes, lie_about_type, other_type, not_finite, extreme_scales,
    other_parts, other_attribute, no_attribute, no_attributes, other_inputs, fewer_inputs, more_inputs, other_operator,
    unknown_shapes, other_input_type, other_version,
]  # fmt: skip
OF_NODES = MUTATIONS[MUTATIONS.index(other_attribute) :]


# ---- sound models


def float_case(numbers: np.random.Generator, dice: random.Random) -> onnx.ModelProto:
    parts = dice.choice((1, 2, 3, 100))
    n, k = dice.choice(((parts * dice.randint(1, 13), dice.randint(1, 140)), (parts * 20, 1), (parts, 2500)))
    value_type = dice.choice((np.float32, np.float16))
    S = random_sparse(numbers, n, k, dice.choice((0.2, 0.6, 1)), value_type)
    bias = numbers.standard_normal(n, np.float32) if dice.random() < 0.5 else None
    low_rank = random_low_rank(numbers, n, k, parts, dice.randint(0, 9), value_type) if dice.random() < 0.5 else None
    return operator_model(S, value_type, bias, low_rank, function=dice.random() < 0.3)


def int8_case(numbers: np.random.Generator, dice: random.Random) -> onnx.ModelProto:
    parts = dice.choice((1, 1, 2, 3))
    n = dice.randint(1, 70) if parts == 1 else parts * 16 * dice.randint(1, 3)
    k = dice.choice((1, dice.randint(2, 140), 2500))
    name = dice.choice(sorted(INT8_OPERATORS))
    case = random_case(numbers, name, n, k, dice.choice((0, 0.5, 0.9, 1)), parts, dice.choice((1, 7, 40)))
    return int8_model(case, function=dice.random() < 0.3)


def attention_case(numbers: np.random.Generator, dice: random.Random) -> onnx.ModelProto:
    scale = dice.choice((0.125, 1.0, 0.0, -0.5))
    return attention_model(dice.randint(1, 4), dice.choice((1, 7, 32, 64)), scale, dice.randint(0, 1), dice.random() < 0.3)


def composite_case(numbers: np.random.Generator, dice: random.Random) -> onnx.ModelProto:
    name, width = dice.choice(sorted(COMPOSITES)), dice.choice((1, dice.randint(2, 140)))
    case = random_composite(numbers, name, width, dice.choice((1, 16, dice.randint(2, 100))), dice.randint(1, 3))
    return composite_model(case, function=dice.random() < 0.3)


def feeds(model: onnx.ModelProto, numbers: np.random.Generator, dice: random.Random) -> dict[str, np.ndarray]:
    """Inputs of a sound model: batch 1 and some number of tokens, with a number now and then that is none."""
    tokens, found = dice.choice((0, 1, 5, 30)), {}
    for value in model.graph.input:
        x = numbers.standard_normal((1, tokens, value.type.tensor_type.shape.dim[2].dim_value), np.float32)
        if x.size and dice.random() < 0.3:
            x.flat[dice.randrange(x.size)] = dice.choice(NUMBERS)
        found[value.name] = x
    return found


def other_shape(x: np.ndarray, dice: random.Random) -> np.ndarray:
    """What a session of unknown shapes gets as well."""
    return dice.choice((x[0], x[None], x[..., :-1], x[:, :-1], x[:0], x.reshape(-1), np.concatenate([x, x], -1)))


def outcome(content: bytes, library: str, threads: int, inputs: dict[str, np.ndarray]) -> tuple[bool, np.ndarray | None]:
    """Whether a session was made, and what it computed, None for an error."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    options.register_custom_ops_library(library)
    try:
        opened = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception:
        return False, None
    try:
        return True, opened.run(None, inputs)[0]
    except Exception:
        return True, None


def same(found: np.ndarray | None, again: np.ndarray | None) -> bool:
    if found is None or again is None:
        return found is again
    return np.array_equal(found, again, equal_nan=True)


def main(library: str, cases: int, seed: int) -> None:
    dice, made, refused = random.Random(seed), 0, 0
    for _ in range(cases):
        numbers = np.random.default_rng(dice.getrandbits(32))
        kind = dice.choice((float_case, int8_case, composite_case, attention_case))
        model = kind(numbers, dice)
        inputs = feeds(model, numbers, dice)
        for _ in range(dice.choice((1, 1, 2, 3))):
            dice.choice(OF_NODES if kind is attention_case else MUTATIONS)(model, dice)
        if dice.random() < 0.1:
            unknown_shapes(model, dice)
            inputs = {name: other_shape(x, dice) if dice.random() < 0.7 else x for name, x in inputs.items()}
        content = model.SerializeToString()
        opened, found = outcome(content, library, 1, inputs)
        made += opened
        refused += found is None
        if opened:
            assert same(found, outcome(content, library, 2, inputs)[1]), model
    print(f"{made} sessions made, {refused} errors")
    assert made > cases // 20, "hardly a session was made: the mutations are too hard to say anything"
    assert refused > cases // 3, "hardly an error: the mutations are too soft to say anything"


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
