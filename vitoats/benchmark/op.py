"""Times one product y = x (S + U V)^T: the native kernels against ONNX Runtime's dense and dynamic int8 MatMul.

Times include the operator's other work: transposing or quantizing the activations.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vitoats.benchmark.int8_products import dense_layer, int8_product, sparse_layer
from vitoats.benchmark.onnx_models import dense_model, int8_model, sparse_model
from vitoats.benchmark.products import Pattern, Product, copies_beyond_cache, exact, product_ms, random_zeros
from vitoats.benchmark.random_layers import random_low_rank
from vitoats.common.progress import StageProgress
from vitoats.models.shapes import LayerShape

INT8_TOLERANCE = 0.05  # of ONNX Runtime's int8, whose activations have one scale for all tokens
FLOAT16_TOLERANCE = 2e-3


@dataclass(frozen=True)
class Tokens:
    """A batch: the number of images, and the number of tokens per image."""

    images: int
    of_image: int

    @property
    def total(self) -> int:
        return self.images * self.of_image

    def __str__(self) -> str:
        return f"{self.images}x{self.of_image}" if self.images > 1 else str(self.of_image)


@dataclass(frozen=True)
class Grid:
    """The products to time: all combinations.

    Attributes:
        shapes: shapes [n, k] of the weights: outputs and inputs.
        tokens: batches.
        threads: numbers of threads of ONNX Runtime.
        zeros: percentages of zeros.
        patterns: patterns of the zeros.
        rank: rank of U V; 0 for none.
    """

    shapes: Sequence[tuple[int, int]]
    tokens: Sequence[Tokens]
    threads: Sequence[int]
    zeros: Sequence[float]
    patterns: Sequence[Pattern]
    rank: int = 0


@dataclass(frozen=True)
class ProductTimes:
    """One sparse product and its dense counterparts.

    Attributes:
        n: outputs.
        k: inputs.
        tokens: tokens of all images together.
        batch: images x tokens per image, as text.
        zeros: percentage of zeros.
        pattern: pattern of the zeros.
        rank: rank of U V.
        threads: threads of ONNX Runtime.
        dense_ms: milliseconds of ONNX Runtime's MatMul.
        int8_ms: of its DynamicQuantizeMatMul.
        sparse_ms: of SparseMatMul.
        native_int8_ms: of MatMulInt8, without zeros or a low-rank term.
        sparse_int8_ms: of SparseMatMulInt8.
        speedup: speedup of SparseMatMul over ``dense_ms``.
        native_int8_speedup, sparse_int8_speedup: speedups of the native int8 operators over ``int8_ms``.
        nnz_gflops: 10^9 operations per second of SparseMatMul; a multiply-add with a value of S, U or V counts as two.
        fma_share: ``nnz_gflops`` as a percentage of the peak of the cores.
    """

    n: int
    k: int
    tokens: int
    batch: str
    zeros: float
    pattern: Pattern
    rank: int
    threads: int
    dense_ms: float
    int8_ms: float
    sparse_ms: float
    native_int8_ms: float
    sparse_int8_ms: float
    speedup: float
    native_int8_speedup: float
    sparse_int8_speedup: float
    nnz_gflops: float
    fma_share: float


def time_products(
    grid: Grid, peak_gflops: float, float16: bool = False, seed: int = 0, progress: StageProgress = lambda *_: None
) -> list[ProductTimes]:
    """Times all products of a grid.

    Args:
        grid: the products.
        peak_gflops: the peak of one core (``vitoats.runtime.library.fma_peak_gflops``).
        float16: store the sparse values as float16.
        seed: seed of weights and activations.
        progress: called before each shape, batch and number of threads.

    Raises:
        RunError: a kernel gives wrong results.
    """
    groups = list(itertools.product(grid.threads, grid.shapes, grid.tokens))
    rows: list[ProductTimes] = []
    for done, (threads, (n, k), tokens) in enumerate(groups):
        progress(done, len(groups), f"{n}x{k}, {tokens} tokens, {threads} threads")
        rows += _time_shape(n, k, tokens, threads, grid, peak_gflops, float16, seed)
    return rows


def _time_shape(
    n: int, k: int, tokens: Tokens, threads: int, grid: Grid, peak_gflops: float, float16: bool, seed: int
) -> list[ProductTimes]:
    """Times dense, int8 and all sparse variants in turns; a row for each pattern and share of zeros."""
    random = np.random.default_rng(seed)
    x = random.standard_normal((tokens.images, tokens.of_image, k), np.float32)
    W = random.standard_normal((n, k), np.float32) / math.sqrt(k)
    low_rank = random_low_rank(LayerShape(n, k, 1, tokens.of_image), grid.rank, random) if grid.rank else None
    UV = low_rank[0][0] @ low_rank[1][0] if low_rank else np.zeros_like(W)
    sparse = {(z, p): random_zeros(W, z, p, random) for z, p in itertools.product(grid.zeros, grid.patterns)}
    copies, int8_copies = (copies_beyond_cache(n, k, tokens.total, weight_bytes) for weight_bytes in (4, 1))
    tolerance = FLOAT16_TOLERANCE if float16 else 1e-4

    def products():
        yield Product(dense_model(W, copies), copies, exact(x, W))
        yield Product(int8_model(W, int8_copies), int8_copies, exact(x, W), INT8_TOLERANCE)
        yield int8_product(dense_layer(W), x, int8_copies)
        for S in sparse.values():
            yield Product(sparse_model(S, copies, float16, low_rank), copies, exact(x, S + UV), tolerance)
            yield int8_product(sparse_layer(S, low_rank), x, int8_copies)

    dense_ms, int8_ms, native_int8_ms, *of_sparse = product_ms(products(), x, threads)
    rows = []
    for ((zeros, pattern), S), ms, ms_int8 in zip(sparse.items(), of_sparse[::2], of_sparse[1::2], strict=True):
        gflops = 2 * (np.count_nonzero(S) + grid.rank * (n + k)) * tokens.total / ms / 1e6
        rows.append(
            ProductTimes(
                n=n,
                k=k,
                tokens=tokens.total,
                batch=str(tokens),
                zeros=zeros,
                pattern=pattern,
                rank=grid.rank,
                threads=threads,
                dense_ms=round(dense_ms, 4),
                int8_ms=round(int8_ms, 4),
                sparse_ms=round(ms, 4),
                native_int8_ms=round(native_int8_ms, 4),
                sparse_int8_ms=round(ms_int8, 4),
                speedup=round(dense_ms / ms, 3),
                native_int8_speedup=round(int8_ms / native_int8_ms, 3),
                sparse_int8_speedup=round(int8_ms / ms_int8, 3),
                nnz_gflops=round(gflops, 2),
                fma_share=round(100 * gflops / (peak_gflops * threads), 1),
            )
        )
    return rows
