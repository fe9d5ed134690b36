"""Single products y = x W^T, timed in turns, with weights that come from memory and results that are checked first."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx
import onnxruntime as ort

from vitoats.benchmark.timing import median_ms
from vitoats.common.errors import RunError
from vitoats.common.machine import last_level_cache
from vitoats.runtime.inference import inference
from vitoats.runtime.library import register

Pattern = Literal["row", "layer"]  # the same number of zeros in each row, or any, over the whole matrix

CACHES = 2  # a run reads and writes as much as that many last-level caches hold, so the next run finds little of it there
MOST_COPIES = 64  # models with the hundreds of copies that small products would need take seconds to build and open


@dataclass(frozen=True)
class Product:
    """One way to compute a product.

    Attributes:
        model: computes it, ``copies`` times (``vitoats.benchmark.onnx_models``).
        weight: [n, k], what x is to be multiplied by; None where the result is not checked.
        tolerance: how far results may be off, relative to the largest.
    """

    model: onnx.ModelProto
    weight: np.ndarray | None = None
    tolerance: float = 1e-4


def copies_beyond_cache(n: int, k: int, tokens: int) -> int:
    """How many copies of a product, [tokens, k] times [k, n] in float32, one timed run has to go through.

    If a run computed one product alone, its weights would still be in the processor's cache from the run before, and it would
    look faster than in a whole model, where the other layers displace them. So the model that is timed holds several copies of
    the product, each with weights of its own, that together exceed the last-level cache. There are ``MOST_COPIES`` at most:
    where the cache holds hundreds of megabytes, small products do stay in it, as a small model would.
    """
    bytes_of_one = 4 * (n * k + tokens * (n + k))
    return min(max(math.ceil(CACHES * last_level_cache() / bytes_of_one), 1), MOST_COPIES)


def product_ms(products: Iterable[Product], x: np.ndarray, copies: int, threads: int) -> list[float]:
    """Times products of the same x against each other.

    Args:
        products: opened one after the other, so that a generator need not hold all models at a time.
        x: [images, tokens, k].
        copies: of the product in each model.
        threads: of ONNX Runtime.

    Returns:
        milliseconds of one product, for each.

    Raises:
        RunError: a result is wrong.
    """
    calls = []
    for product in products:
        opened = open_model(product.model, threads)
        if product.weight is not None:
            check(product.weight, x, opened.run(None, {"x": x})[0], product.tolerance)
        calls.append(inference(opened, x))
    return [ms / copies for ms in median_ms(calls)]


def random_zeros(W: np.ndarray, zeros: float, pattern: Pattern, random: np.random.Generator) -> np.ndarray:
    """A copy of W [n, k] with ``zeros`` percent of zeros at random places."""
    groups = W.copy() if pattern == "row" else W.reshape(1, -1).copy()
    drop = round(zeros / 100 * groups.shape[1])
    places = np.argsort(random.random(groups.shape), axis=1)[:, :drop]
    np.put_along_axis(groups, places, 0, axis=1)
    return groups.reshape(W.shape)


def check(weight: np.ndarray, x: np.ndarray, y: np.ndarray, tolerance: float) -> None:
    """Compares the first token's outputs with float64 algebra: a kernel that is wrong has no speed.

    Raises:
        RunError: they differ by more than ``tolerance``, relative to the largest output.
    """
    expected = x[0, 0].astype(np.float64) @ weight.T.astype(np.float64)
    error = np.abs(y.ravel()[: expected.size] - expected).max()
    if not error <= tolerance * np.abs(expected).max() + 1e-12:  # nor is NaN
        n, k = weight.shape
        raise RunError(f"the kernel for {n} x {k} weights is wrong by {error:.3g}: install vitoats again, or report it")


def open_model(model: onnx.ModelProto, threads: int) -> ort.InferenceSession:
    """A session with the native operator, whose threads sleep between runs: those that spin would slow the next session's."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")
    register(options)
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
