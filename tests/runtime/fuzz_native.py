"""Makes sessions of mutated models with a given build of the native library: python fuzz_native.py LIBRARY CASES SEED

Each model is a sound one with one to three mutations. A session may be refused with an error, or made; then it is run. Anything
else ends the process, and with a library under sanitizers so does any access out of bounds. The last line counts both outcomes.
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

from tests.runtime.sparse_models import operator_model, random_low_rank, random_sparse

SIZES = (0, 1, 2, 7, 8, 9, 63, 64, 65, 255, 2**16, 2**31 - 1, 2**31, 2**62, 2**63 - 1, -1, -8, -(2**63))
TYPES = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.UINT8, TensorProto.INT8, TensorProto.DOUBLE, TensorProto.BOOL)


def tensor(model: onnx.ModelProto, dice: random.Random) -> onnx.TensorProto:
    return dice.choice(list(model.graph.initializer))


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
    width = {TensorProto.FLOAT: 4, TensorProto.FLOAT16: 2}.get(chosen.data_type, 1)
    chosen.raw_data = dice.randbytes(width * int(np.prod(shape, dtype=np.int64)))


def lie_about_sizes(model, dice):
    chosen = tensor(model, dice)
    if chosen.dims:
        chosen.dims[dice.randrange(len(chosen.dims))] = dice.choice(SIZES)
    else:
        chosen.dims.append(dice.choice(SIZES))


def lie_about_type(model, dice):
    tensor(model, dice).data_type = dice.choice(TYPES)


def other_in_features(model, dice):
    for attribute in model.graph.node[0].attribute:
        attribute.i = dice.choice(SIZES)


def not_finite(model, dice):
    """An infinity or NaN among the numbers, of either width."""
    chosen = tensor(model, dice)
    pattern = {TensorProto.FLOAT: b"\x00\x00\x80\x7f", TensorProto.FLOAT16: b"\x01\x7c"}.get(chosen.data_type, b"\xff")
    data = bytearray(chosen.raw_data)
    if len(data) >= len(pattern):
        at = dice.randrange(len(data) // len(pattern)) * len(pattern)
        data[at : at + len(pattern)] = pattern
    chosen.raw_data = bytes(data)


def other_parts(model, dice):
    """Zeros for U and V, cut into parts and ranks in another way, which may be a sound one."""
    factors = [t for t in model.graph.initializer if t.name in ("U", "V") and len(t.dims) == 3]
    if len(factors) < 2:
        return
    n, k = factors[0].dims[0] * factors[0].dims[1], factors[1].dims[2]
    if n < 1 or k < 1 or n * k > 10**6:  # sizes that another mutation made up
        return
    parts, rank = dice.choice([p for p in range(1, n + 1) if n % p == 0]), dice.choice((0, 1, 5))
    for factor, shape in zip(factors, ((parts, n // parts, rank), (parts, rank, k)), strict=True):
        width = {TensorProto.FLOAT: 4, TensorProto.FLOAT16: 2}.get(factor.data_type, 1)
        factor.dims[:] = shape
        factor.raw_data = bytes(width * parts * rank * (n // parts if factor.name == "U" else k))


def no_attribute(model, dice):
    del model.graph.node[0].attribute[:]


def other_inputs(model, dice):
    inputs = model.graph.node[0].input
    if inputs:
        inputs[dice.randrange(len(inputs))] = dice.choice([*inputs, ""])


def fewer_inputs(model, dice):
    del model.graph.node[0].input[dice.randint(0, 4) :]


def more_inputs(model, dice):
    model.graph.node[0].input.extend(dice.choices(["", *model.graph.node[0].input], k=dice.randint(1, 3)))


def unknown_shapes(model, dice):
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.ClearField("shape")


MUTATIONS: list[Callable] = [
    flip_bits, cut_data, grow_data, resize, lie_about_sizes, lie_about_type, other_in_features, no_attribute, other_inputs,
    fewer_inputs, more_inputs, unknown_shapes, not_finite, other_parts,
]  # fmt: skip


def main(library: str, cases: int, seed: int) -> None:
    dice, made, refused = random.Random(seed), 0, 0
    for _ in range(cases):
        numbers = np.random.default_rng(dice.getrandbits(32))
        parts = dice.choice((1, 2, 3, 100))
        n, k = dice.choice(((parts * dice.randint(1, 13), dice.randint(1, 140)), (parts * 20, 1), (parts, 2500)))
        value_type = dice.choice((np.float32, np.float16))
        S = random_sparse(numbers, n, k, dice.choice((0.2, 0.6, 1)), value_type)
        bias = numbers.standard_normal(n, np.float32) if dice.random() < 0.5 else None
        low_rank = random_low_rank(numbers, n, k, parts, dice.randint(0, 9), value_type) if dice.random() < 0.5 else None
        model = operator_model(S, value_type, bias, low_rank, function=dice.random() < 0.3)
        for _ in range(dice.randint(1, 3)):
            dice.choice(MUTATIONS)(model, dice)
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = dice.choice((1, 2))
        options.register_custom_ops_library(library)
        try:
            opened = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
            made += 1
        except Exception:
            refused += 1
            continue
        tokens = dice.choice((0, 1, 5, 30))
        x = numbers.standard_normal((1, tokens, k), np.float32)
        if x.size and dice.random() < 0.3:
            x.flat[dice.randrange(x.size)] = dice.choice((np.inf, np.nan, 1e-40))
        try:
            opened.run(None, {"x": x})
        except Exception:
            refused += 1
    print(f"{made} sessions made, {refused} errors")
    assert made > cases // 20, "hardly a session was made: the mutations are too hard to say anything"
    assert refused > cases // 3, "hardly an error: the mutations are too soft to say anything"


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
