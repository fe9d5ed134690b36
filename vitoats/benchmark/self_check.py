"""One product by each kernel that this processor can run, against NumPy in float64."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from vitoats.benchmark.int8_products import expected as int8_expected
from vitoats.benchmark.int8_products import int8_layer_model, sparse_layer
from vitoats.benchmark.onnx_models import sparse_model
from vitoats.benchmark.products import exact, open_model, random_zeros
from vitoats.runtime.library import ISA_VARIABLE, available_isas

D_OUT, D_IN, TOKENS, RANK, ZEROS = 96, 160, 5, 8, 60
TOLERANCE = {"float32": 1e-4, "int8": 2e-3}  # of the largest output; in int8 a tie may be rounded the other way


def kernel_errors(seed: int = 0) -> dict[str, dict[str, float]]:
    """The largest errors of a sparse + low-rank product, relative to its largest output.

    Returns:
        by instruction set, the error in float32 and in int8; compare them with ``TOLERANCE``.

    Raises:
        InputError: the native library is not installed.
    """
    random = np.random.default_rng(seed)
    S = random_zeros(random.standard_normal((D_OUT, D_IN), np.float32), ZEROS, "layer", random)
    U, V = random.standard_normal((1, D_OUT, RANK), np.float32), random.standard_normal((1, RANK, D_IN), np.float32)
    x = random.standard_normal((1, TOKENS, D_IN), np.float32)
    int8 = sparse_layer(S, (U, V))
    models = {"float32": sparse_model(S, 1, low_rank=(U, V)), "int8": int8_layer_model(int8, 1)}
    wanted = {"float32": exact(x, S + U[0] @ V[0]), "int8": int8_expected(int8, x)}
    errors: dict[str, dict[str, float]] = {}
    for isa in available_isas():
        with _forced(isa):
            found = {kind: open_model(model, 1).run(None, {"x": x})[0][0, 0] for kind, model in models.items()}
        errors[isa] = {k: float(np.abs(found[k] - wanted[k]).max() / np.abs(wanted[k]).max()) for k in found}
    return errors


@contextmanager
def _forced(isa: str) -> Iterator[None]:
    """In this context new sessions use the kernels of one instruction set."""
    before = os.environ.get(ISA_VARIABLE)
    os.environ[ISA_VARIABLE] = isa
    try:
        yield
    finally:
        if before is None:
            del os.environ[ISA_VARIABLE]
        else:
            os.environ[ISA_VARIABLE] = before
