"""Measures what a model's linear layers cost, for budgets in milliseconds: benchmark op with --model.

    python tools/benchmark.py op --model dinov2_vitb14 --threads 2 --results-file costs.json
    python tools/compress.py --model dinov2_vitb14 --method oats-h --speedup 1.5 --cost-table costs.json ...

Speed depends on shapes and on how many zeros there are, so supports and low-rank terms are random, and so are the weights where
the model's own cannot be had. What is not linear layers is what the whole model takes with ``MODEL_ZEROS`` and the low-rank
terms that go with it, less its layers.
"""

import copy
import math
import tempfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vitoats.allocation.cost import Content, CostTable
from vitoats.cli import common
from vitoats.cli.benchmark_op import MOST_COPIES, check, dense_model, last_level_cache, open_model, pruned, sparse_model
from vitoats.common.errors import InputError
from vitoats.models.shapes import LayerShape, layer_shapes

if TYPE_CHECKING:
    from vitoats.loading.load import LoadedModel

ZEROS = (25.0, 50.0, 62.5, 75.0, 87.5, 95.0)
MODEL_ZEROS = 70.0  # as at a compression of 60 % with a rank ratio of 0.25
LOW_RANK = (0.05, 0.1)  # elements of U and V to weights, with MODEL_ZEROS in S; the model has the last
TURN_SECONDS = 0.3


def main(args: Namespace) -> dict[str, Any]:
    """Measures the model that the flags name; returns the JSON line, which is the table."""
    from vitoats.report.tables import print_table

    if args.threads and len(args.threads) > 1:
        raise InputError("a cost table is for one number of threads: give --threads once")
    loaded, weights = common.load_or_randomise(args)
    with common.Bar("measuring", args.quiet) as bar:
        table = measure_costs(loaded, args.batch, (args.threads or [common.cores()])[0], args.seed, bar.update)
    print_table(
        f"{args.model} ({weights}), batch {args.batch}, {table['threads']} threads: dense {table['dense_ms']:.2f} ms, "
        f"sparse {table['sparse_ms']:.2f} ms, of which {table['rest_ms']:.2f} ms are not linear layers",
        ("n x k", "layers", "tokens", "zeros %", "rank", "dense ms", "sparse ms", "speedup"),
        [
            (
                f"{row['n']} x {row['k']}",
                f"{row['layers']}",
                f"{row['tokens']}",
                f"{row['zeros']:g}",
                f"{row['blocks']} x {row['rank']}",
                f"{row['dense_ms']:.3f}",
                f"{row['sparse_ms']:.3f}",
                f"{row['dense_ms'] / row['sparse_ms']:.2f}x",
            )
            for row in table["rows"]
        ],
    )
    return {"model": args.model, "weights": weights, **table}


def measure_costs(
    loaded: "LoadedModel", batch: int, threads: int, seed: int, progress: Callable[[int, int, str], None]
) -> dict[str, Any]:
    """Measures a dense model's layers and the whole of it.

    Args:
        loaded: the model; it stays as it is.
        batch: images at a time.
        threads: of ONNX Runtime.
        seed: of what is random.
        progress: told what is being done.

    Returns:
        plain values, as ``CostTable.from_json`` takes them.
    """
    from vitoats.models.adapter import adapt
    from vitoats.runtime.library import isa

    kernels = isa()  # without a native library it ends here
    random = np.random.default_rng(seed)
    shapes = layer_shapes(adapt(loaded.timm_model, loaded.inputs))
    distinct = sorted(set(shapes.values()))
    rows: list[dict[str, Any]] = []
    for done, shape in enumerate(distinct):
        progress(done, len(distinct) + 1, f"{shape}, {shape.tokens} tokens")
        rows += measure_shape(shape, list(shapes.values()).count(shape), batch, threads, random)
    progress(len(distinct), len(distinct) + 1, "whole models")
    dense_ms, sparse_ms = measure_models(loaded, shapes, batch, threads, random)
    table = {
        **loaded.inputs.to_dict(),
        "processor": common.processor(),
        "isa": kernels,
        "threads": threads,
        "batch": batch,
        "dense_ms": round(dense_ms, 4),
        "sparse_ms": round(sparse_ms, 4),
        "rest_ms": 0.0,
        "rows": rows,
    }
    costs = CostTable.from_json(table)
    table["rest_ms"] = round(sparse_ms - sum(costs.ms(shape, model_content(shape)) for shape in shapes.values()), 4)
    return table


def measure_shape(
    shape: LayerShape, layers: int, batch: int, threads: int, random: np.random.Generator
) -> list[dict[str, Any]]:
    """One shape dense, at all shares of zeros, and with low-rank terms, in turns; a row for each but the dense one."""
    from vitoats.runtime.inference import inference, median_ms

    n, k = shape.d_out, shape.d_in
    x = random.standard_normal((batch, shape.tokens, k), np.float32)
    copies = min(max(math.ceil(2 * last_level_cache() / (4 * (n * k + batch * shape.tokens * (n + k)))), 1), MOST_COPIES)
    W = random.standard_normal((n, k), np.float32) / math.sqrt(k)
    variants = [(zeros, 0) for zeros in ZEROS] + [(MODEL_ZEROS, rank_of(shape, share)) for share in LOW_RANK]
    sessions = [open_model(dense_model(W, copies), threads)]
    for zeros, rank in variants:
        S = pruned(W, zeros, "layer", random)
        low_rank = random_low_rank(shape, rank, random) if rank else None
        sessions.append(open_model(sparse_model(S, copies, False, low_rank), threads))
        whole = S if low_rank is None else S + (low_rank[0] @ low_rank[1]).reshape(n, k)
        check(whole, x, sessions[-1].run(None, {"x": x})[0], 1e-4)
    times = [ms / copies for ms in median_ms([inference(opened, x) for opened in sessions])]
    return [
        {
            "n": n,
            "k": k,
            "blocks": shape.parts,
            "tokens": shape.tokens,
            "layers": layers,
            "zeros": zeros,
            "rank": rank,
            "dense_ms": round(times[0], 5),
            "sparse_ms": round(ms, 5),
        }
        for (zeros, rank), ms in zip(variants, times[1:], strict=True)
    ]


def measure_models(
    loaded: "LoadedModel", shapes: dict[str, LayerShape], batch: int, threads: int, random: np.random.Generator
) -> tuple[float, float]:
    """Milliseconds of the dense model, and of one whose layers are random: as ``model_content`` says."""
    import torch

    from vitoats.export.onnx_file import export_onnx
    from vitoats.format.layers import SparseLowRankLinear, replace_module
    from vitoats.runtime.inference import inference, median_ms, session

    sparse = copy.deepcopy(loaded)
    for name, shape in shapes.items():
        module: Any = sparse.timm_model.get_submodule(name)
        weight = module.weight.detach().cpu().numpy()
        S = np.where(random.random(weight.shape, np.float32) * 100 >= MODEL_ZEROS, weight, 0)
        stacked = random_low_rank(shape, rank_of(shape, LOW_RANK[-1]), random)
        U, V = ([torch.from_numpy(term) for term in stack] for stack in stacked)
        replace_module(sparse.timm_model, name, SparseLowRankLinear(torch.from_numpy(S), U, V, module.bias))
    images = random.standard_normal(loaded.inputs.shape(batch), np.float32)
    with tempfile.TemporaryDirectory(prefix="vitoats-benchmark-") as scratch:
        calls = []
        for name, model in (("dense", loaded), ("sparse", sparse)):
            export_onnx(model, Path(scratch) / f"{name}.onnx")
            calls.append(inference(session(Path(scratch) / f"{name}.onnx", threads), images))
    dense_ms, sparse_ms = median_ms(calls, rounds=9, turn_seconds=TURN_SECONDS)
    return dense_ms, sparse_ms


def model_content(shape: LayerShape) -> Content:
    """What a layer of the sparse model holds."""
    low_rank = shape.low_rank_parameters(rank_of(shape, LOW_RANK[-1]))
    return Content(round((1 - MODEL_ZEROS / 100) * shape.size), low_rank)


def rank_of(shape: LayerShape, share: float) -> int:
    """The rank of each part whose U and V have about that share of the weights' elements, at least 1."""
    return max(1, round(share * shape.size / shape.low_rank_parameters(1)))


def random_low_rank(shape: LayerShape, rank: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """U [parts, d_out / parts, rank] and V [parts, rank, d_in], of a product about as large as the weights."""
    scale = (shape.d_in * rank) ** -0.25
    of_u, of_v = (shape.parts, shape.d_out // shape.parts, rank), (shape.parts, rank, shape.d_in)
    U, V = (scale * random.standard_normal(size, np.float32) for size in (of_u, of_v))
    return U.astype(np.float32), V.astype(np.float32)
