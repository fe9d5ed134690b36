"""The latency of a model's linear layers on this machine, dense and sparse: the cost table behind budgets in milliseconds.

Each layer is measured in float32 and in int8, with the native operators, except that a dense float32 layer is ONNX Runtime's
MatMul. Speed depends on shapes and on the number of zeros, not on which weights are zero, so zeros and low-rank terms are
random. The cost of everything except the linear layers is a difference: the latency of the whole model with random layers
(``MODEL_ZEROS`` and the last of ``LOW_RANK``), minus the latency of these layers according to the table. In int8 it is a
different one, because the int8 operators take over what comes before and after a layer.
"""

import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vitoats.allocation.cost import CostTable, LayerFootprint
from vitoats.benchmark.int8_products import dense_layer, int8_product, sparse_layer
from vitoats.benchmark.onnx_models import dense_model, sparse_model
from vitoats.benchmark.products import Product, copies_beyond_cache, exact, product_ms, random_zeros
from vitoats.benchmark.random_layers import random_low_rank, with_random_layers
from vitoats.benchmark.timing import median_ms
from vitoats.common.machine import processor
from vitoats.common.progress import StageProgress
from vitoats.export.onnx_file import export_onnx
from vitoats.loading.loaded import LoadedModel
from vitoats.models.adapter import adapt
from vitoats.models.shapes import LayerShape, layer_shapes
from vitoats.runtime.inference import inference, session
from vitoats.runtime.library import isa

ZEROS = (25.0, 50.0, 62.5, 75.0, 87.5, 95.0)  # percent, without a low-rank term
MODEL_ZEROS = 70.0  # percent, with a low-rank term: a compression of 60 % at a rank ratio of 0.25
LOW_RANK = (0.05, 0.1)  # elements of U and V as a share of the weights, with MODEL_ZEROS; the last is that of the whole model
MODEL_ROUNDS, MODEL_TURN_SECONDS = 9, 0.3  # more than for layers: rest_ms is a small difference of large times


def measure_costs(
    loaded: LoadedModel, batch: int = 1, threads: int = 1, seed: int = 0, progress: StageProgress = lambda *_: None
) -> dict[str, Any]:
    """Measures the linear layers of a dense model, and the whole model.

    Args:
        loaded: the model; it is not modified.
        batch: batch size.
        threads: threads of ONNX Runtime.
        seed: seed of inputs, zeros and low-rank terms.
        progress: called before each layer shape.

    Returns:
        plain values, as ``CostTable.from_json`` takes them.

    Raises:
        InputError: the native library is not installed.
        RunError: a kernel gives wrong results.
    """
    kernels = isa()
    random = np.random.default_rng(seed)
    shapes = layer_shapes(adapt(loaded.timm_model, loaded.inputs))
    distinct = sorted(set(shapes.values()))
    rows: list[dict[str, Any]] = []
    for done, shape in enumerate(distinct):
        progress(done, len(distinct) + 1, f"{shape}, {shape.tokens} tokens")
        rows += _time_shape(shape, list(shapes.values()).count(shape), batch, threads, random)
    progress(len(distinct), len(distinct) + 1, "whole models")
    dense_ms, sparse_ms, sparse_int8_ms = _time_models(loaded, batch, threads, random)
    table = {
        **loaded.inputs.to_dict(),
        "processor": processor(),
        "isa": kernels,
        "threads": threads,
        "batch": batch,
        "dense_ms": round(dense_ms, 4),
        "sparse_ms": round(sparse_ms, 4),
        "sparse_int8_ms": round(sparse_int8_ms, 4),
        "rest_ms": 0.0,
        "rest_int8_ms": 0.0,
        "rows": rows,
    }
    for key, whole, int8 in (("rest_ms", sparse_ms, False), ("rest_int8_ms", sparse_int8_ms, True)):
        costs = CostTable.from_json(table, int8)
        table[key] = round(whole - sum(costs.ms(shape, model_footprint(shape)) for shape in shapes.values()), 4)
    return table


def model_footprint(shape: LayerShape) -> LayerFootprint:
    """The kept elements of a layer in the whole sparse model."""
    zeros, rank = _model_content(shape)
    return LayerFootprint(round((1 - zeros / 100) * shape.size), shape.low_rank_parameters(rank))


def _model_content(shape: LayerShape) -> tuple[float, int]:
    """The percentage of zeros and the rank of a layer in the whole sparse model."""
    return MODEL_ZEROS, _rank(shape, LOW_RANK[-1])


def _time_shape(shape: LayerShape, layers: int, batch: int, threads: int, random: np.random.Generator) -> list[dict[str, Any]]:
    """Times one shape dense, at each share of zeros, and with low-rank terms, in turns; a row for each sparse variant."""
    n, k = shape.d_out, shape.d_in
    x = random.standard_normal((batch, shape.tokens, k), np.float32)
    copies, int8_copies = (copies_beyond_cache(n, k, batch * shape.tokens, weight_bytes) for weight_bytes in (4, 1))
    W = random.standard_normal((n, k), np.float32) / math.sqrt(k)
    variants = [(zeros, 0) for zeros in ZEROS] + [(MODEL_ZEROS, _rank(shape, share)) for share in LOW_RANK]

    def products() -> Iterator[Product]:
        yield Product(dense_model(W, copies), copies, exact(x, W))
        yield int8_product(dense_layer(W), x, int8_copies)
        for zeros, rank in variants:
            S = random_zeros(W, zeros, "layer", random)
            low_rank = random_low_rank(shape, rank, random) if rank else None
            whole = S if low_rank is None else S + (low_rank[0] @ low_rank[1]).reshape(n, k)
            yield Product(sparse_model(S, copies, low_rank=low_rank), copies, exact(x, whole))
            yield int8_product(sparse_layer(S, low_rank), x, int8_copies)

    dense_ms, dense_int8_ms, *of_sparse = product_ms(products(), x, threads)
    return [
        {
            "n": n,
            "k": k,
            "blocks": shape.parts,
            "tokens": shape.tokens,
            "layers": layers,
            "zeros": zeros,
            "rank": rank,
            "dense_ms": round(dense_ms, 5),
            "sparse_ms": round(ms, 5),
            "dense_int8_ms": round(dense_int8_ms, 5),
            "sparse_int8_ms": round(int8_ms, 5),
        }
        for (zeros, rank), ms, int8_ms in zip(variants, of_sparse[::2], of_sparse[1::2], strict=True)
    ]


def _time_models(loaded: LoadedModel, batch: int, threads: int, random: np.random.Generator) -> list[float]:
    """Milliseconds of the dense model, and of one with layers as ``model_footprint`` has them, in float32 and in int8."""
    sparse = with_random_layers(loaded, _model_content, "layer", random)
    images = random.standard_normal(loaded.inputs.shape(batch), np.float32)
    with tempfile.TemporaryDirectory(prefix="vitoats-benchmark-") as scratch:
        calls = []
        for name, model, int8 in (("dense", loaded, False), ("sparse", sparse, False), ("sparse-int8", sparse, True)):
            export_onnx(model, Path(scratch) / f"{name}.onnx", int8=int8)
            calls.append(inference(session(Path(scratch) / f"{name}.onnx", threads), images))
    return median_ms(calls, MODEL_ROUNDS, MODEL_TURN_SECONDS)


def _rank(shape: LayerShape, share: float) -> int:
    """The rank, at least 1, at which U and V of all parts have about this share of the number of weights."""
    return max(1, round(share * shape.size / shape.low_rank_parameters(1)))
