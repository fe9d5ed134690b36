"""Times single products y = x W^T in turns, with weights that come from memory; results are checked first."""

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

Pattern = Literal["row", "layer"]  # the same number of zeros in each row, or zeros anywhere in the matrix

CACHES = 2  # a run reads and writes as much as this many last-level caches hold, so that the next run finds little in the cache
MOST_COPIES = 64  # small products would need hundreds of copies, and such models take seconds to build and open


@dataclass(frozen=True)
class Product:
    """One way to compute a product.

    Attributes:
        model: a model that computes it ``copies`` times (``vitoats.benchmark.onnx_models``).
        copies: how often.
        expected: [n], the outputs of the first token.
        tolerance: largest error of a result, relative to the largest result.
    """

    model: onnx.ModelProto
    copies: int
    expected: np.ndarray
    tolerance: float = 1e-4


def copies_beyond_cache(n: int, k: int, tokens: int, weight_bytes: int = 4) -> int:
    """How many copies of a product, [tokens, k] times [k, n], one timed run has to compute.

    If a run computed only one product, its weights would still be in the cache from the previous run. It would look faster than
    in a whole model, where the other layers evict them. So the timed model holds several copies of the product, with different
    weights, that together exceed the last-level cache. There are at most ``MOST_COPIES``: in a cache of hundreds of megabytes
    small products do stay, as a small model would.
    """
    bytes_of_one = weight_bytes * n * k + 4 * tokens * (n + k)
    return min(max(math.ceil(CACHES * last_level_cache() / bytes_of_one), 1), MOST_COPIES)


def product_ms(products: Iterable[Product], x: np.ndarray, threads: int) -> list[float]:
    """Times products of the same x against each other.

    Args:
        products: the products, opened one after the other, so that a generator never holds all models at once.
        x: [images, tokens, k].
        threads: threads of ONNX Runtime.

    Returns:
        milliseconds of a single copy of each product.

    Raises:
        RunError: a result is wrong.
    """
    calls, copies = [], []
    for product in products:
        opened = open_model(product.model, threads)
        check(product.expected, x, opened.run(None, {"x": x})[0], product.tolerance)
        calls.append(inference(opened, x))
        copies.append(product.copies)
    return [ms / n for ms, n in zip(median_ms(calls), copies, strict=True)]


def exact(x: np.ndarray, W: np.ndarray) -> np.ndarray:
    """The outputs [n] of the first token of x [images, tokens, k] for weights W [n, k], in float64."""
    return x[0, 0].astype(np.float64) @ W.T.astype(np.float64)


def random_zeros(W: np.ndarray, zeros: float, pattern: Pattern, random: np.random.Generator) -> np.ndarray:
    """A copy of W [n, k] with ``zeros`` percent of zeros at random positions."""
    groups = W.copy() if pattern == "row" else W.reshape(1, -1).copy()
    drop = round(zeros / 100 * groups.shape[1])
    places = np.argsort(random.random(groups.shape), axis=1)[:, :drop]
    np.put_along_axis(groups, places, 0, axis=1)
    return groups.reshape(W.shape)


def check(expected: np.ndarray, x: np.ndarray, y: np.ndarray, tolerance: float) -> None:
    """Compares the first token's outputs [n] with what they should be: the speed of a wrong kernel means nothing.

    Raises:
        RunError: an output differs by more than ``tolerance``, relative to the largest output.
    """
    error = np.abs(y.ravel()[: expected.size] - expected).max()
    if not error <= tolerance * np.abs(expected).max() + 1e-12:  # true for NaN, too
        shape = f"{expected.size} x {x.shape[-1]}"
        raise RunError(f"the kernel for {shape} weights is wrong by {error:.3g}: install vitoats again, or report it")


def open_model(model: onnx.ModelProto, threads: int) -> ort.InferenceSession:
    """A session with the native operator whose threads sleep between runs: spinning ones would slow down the next session."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")
    register(options)
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
