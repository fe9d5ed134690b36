"""Times one product y = x S^T: the native sparse kernel against ONNX Runtime's dense and dynamic int8 MatMul of the same shape.

    python tools/benchmark.py op
    python tools/benchmark.py op --shape 768x768 --tokens 197 --zeros 62.5 --threads 1
    python tools/benchmark.py op --model dinov2_vits14 --results-file costs.json    (a table of costs: benchmark_costs.py)

Weights come from memory, as they do in a whole model: one run passes over several copies of them, together larger than the last
level of cache. The times are those of one product, with all that the operator does: transposing activations, quantising them.
"""

import argparse
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vitoats.cli import common, config_file, flags
from vitoats.common.errors import InputError

SHAPES = {  # [out, in] of qkv, proj, fc1, fc2
    "ViT-S": ((1152, 384), (384, 384), (1536, 384), (384, 1536)),
    "ViT-B": ((2304, 768), (768, 768), (3072, 768), (768, 3072)),
    "ViT-L": ((3072, 1024), (1024, 1024), (4096, 1024), (1024, 4096)),
}
TOKENS = ("1", "8", "50", "197", "257", "8x50", "8x197")
ZEROS = (50.0, 62.5, 75.0, 87.5)
PATTERNS = ("row", "layer")
MOST_COPIES = 64


@dataclass(frozen=True)
class Shape:
    """The weights' [n, k]: outputs and inputs."""

    n: int
    k: int


@dataclass(frozen=True)
class Tokens:
    """How many images, and tokens of each."""

    images: int
    of_image: int

    def __str__(self) -> str:
        return f"{self.images}x{self.of_image}" if self.images > 1 else str(self.of_image)


def main(argv: list[str]) -> dict[str, Any]:
    """Parses flags, measures; returns the JSON line."""
    parser = flags.parser("benchmark op", "one sparse product against dense and int8")
    several: dict[str, Any] = {"action": "append", "metavar": "X"}
    parser.add_argument("--shape", type=_shape, **several, help="outputs x inputs, such as 768x3072; those of ViT-S, B and L")
    parser.add_argument("--tokens", type=_tokens, **several, help=f"such as 197, or 8x197 for a batch; {', '.join(TOKENS)}")
    parser.add_argument("--zeros", type=flags.percentage, **several, help="percent of zeros; 50, 62.5, 75, 87.5")
    parser.add_argument("--pattern", choices=PATTERNS, action="append", help="zeros alike in each row, or over the layer; both")
    parser.add_argument("--threads", type=flags.positive, **several, help="CPU threads; 1 and 2")
    parser.add_argument("--float16", action="store_true", help="the sparse values are float16")
    parser.add_argument("--seed", type=flags.seed, default=0, help="of weights and activations")
    parser.add_argument(
        "--model", metavar="NAME", help="the layers and the whole of this model instead: a table for --cost-table"
    )
    parser.add_argument("--batch", type=flags.positive, default=1, metavar="N", help="with --model: images at a time")
    parser.add_argument("--img-size", type=flags.positive, metavar="PX", help="with --model: the model's usual one by default")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="with --model: a .pth or .safetensors file")
    parser.add_argument("--random-weights", action="store_true", help="with --model: random weights; nothing is fetched")
    parser.set_defaults(crop_mode=None)
    args = config_file.parse(parser, argv)
    if args.model:
        from vitoats.cli import benchmark_costs

        _refuse(args, ("shape", "tokens", "zeros", "pattern", "float16"), "the layers of --model decide it")
        return benchmark_costs.main(args)
    _refuse(args, ("img_size", "checkpoint", "random_weights"), "it is for --model")

    from vitoats.report.tables import print_table
    from vitoats.runtime.library import fma_peak_gflops, isa

    peak = fma_peak_gflops()
    common.log.info("%s, kernels for %s; one core does %.1f GFLOP/s at most", common.processor(), isa(), peak)
    shapes = args.shape or [Shape(*shape) for shapes in SHAPES.values() for shape in shapes]
    tokens = args.tokens or [_tokens(text) for text in TOKENS]
    zeros, patterns = args.zeros or list(ZEROS), args.pattern or list(PATTERNS)
    groups = list(itertools.product(args.threads or [1, 2], shapes, tokens))
    rows: list[dict[str, Any]] = []
    with common.Bar("measuring", args.quiet) as bar:
        for done, (threads, shape, count) in enumerate(groups):
            bar.update(done, len(groups), f"{shape.n}x{shape.k}, {count} tokens, {threads} threads")
            rows += measure(shape, count, threads, zeros, patterns, args.float16, args.seed, peak)
    print_table(
        f"y = x S^T, values in float{16 if args.float16 else 32}, kernels for {isa()}, one core at most {peak:.0f} GFLOP/s",
        ("n x k", "tokens", "threads", "zeros %", "pattern", "dense ms", "int8 ms", "sparse ms", "speedup", "of peak %"),
        [
            (
                f"{row['n']} x {row['k']}",
                row["batch"],
                f"{row['threads']}",
                f"{row['zeros']:g}",
                row["pattern"],
                f"{row['dense_ms']:.3f}",
                f"{row['int8_ms']:.3f}",
                f"{row['sparse_ms']:.3f}",
                f"{row['speedup']:.2f}x",
                f"{row['fma_share']:.0f}",
            )
            for row in rows
        ],
    )
    return {"processor": common.processor(), "isa": isa(), "fma_peak_gflops": round(peak, 1), "rows": rows}


def _refuse(args: argparse.Namespace, names: tuple[str, ...], reason: str) -> None:
    for name in names:
        if getattr(args, name):
            raise InputError(f"--{name.replace('_', '-')} is out of place, {reason}: leave it out")


def measure(
    shape: Shape, tokens: Tokens, threads: int, zeros: list[float], patterns: list[str], float16: bool, seed: int, peak: float
) -> list[dict[str, Any]]:
    """All variants of one shape, token count and thread count, measured in turns; a row for each pattern and share of zeros."""
    from vitoats.runtime.inference import inference, median_ms

    random = np.random.default_rng(seed)
    x = random.standard_normal((tokens.images, tokens.of_image, shape.k), np.float32)
    bytes_of_one = 4 * (shape.n * shape.k + tokens.images * tokens.of_image * (shape.n + shape.k))
    copies = min(max(math.ceil(2 * last_level_cache() / bytes_of_one), 1), MOST_COPIES)
    dense = random.standard_normal((shape.n, shape.k), np.float32) / math.sqrt(shape.k)
    sparse = {(z, p): pruned(dense, z, p, random) for z, p in itertools.product(zeros, patterns)}
    models = [dense_model(dense, copies), int8_model(dense, copies)]
    models += [sparse_model(S, copies, float16) for S in sparse.values()]
    sessions = [open_model(model, threads) for model in models]
    for S, opened in zip(sparse.values(), sessions[2:], strict=True):
        check(S, x, opened.run(None, {"x": x})[0], 2e-3 if float16 else 1e-4)
    times = [ms / copies for ms in median_ms([inference(opened, x) for opened in sessions])]
    rows = []
    for ((z, pattern), S), ms in zip(sparse.items(), times[2:], strict=True):
        gflops = 2 * np.count_nonzero(S) * tokens.images * tokens.of_image / ms / 1e6
        rows.append(
            {
                "n": shape.n,
                "k": shape.k,
                "tokens": tokens.images * tokens.of_image,
                "batch": str(tokens),
                "zeros": z,
                "pattern": pattern,
                "threads": threads,
                "dense_ms": round(times[0], 4),
                "int8_ms": round(times[1], 4),
                "sparse_ms": round(ms, 4),
                "speedup": round(times[0] / ms, 3),
                "nnz_gflops": round(gflops, 2),
                "fma_share": round(100 * gflops / (peak * threads), 1),
            }
        )
    return rows


def pruned(dense: np.ndarray, zeros: float, pattern: str, random: np.random.Generator) -> np.ndarray:
    """A copy [n, k] with that percentage of zeros at random places, the same number in each row or over the whole matrix."""
    groups = dense.copy() if pattern == "row" else dense.reshape(1, -1).copy()
    drop = round(zeros / 100 * groups.shape[1])
    places = np.argsort(random.random(groups.shape), axis=1)[:, :drop]
    np.put_along_axis(groups, places, 0, axis=1)
    return groups.reshape(dense.shape)


def check(S: np.ndarray, x: np.ndarray, found: np.ndarray, tolerance: float) -> None:
    """Compares the first row of outputs with float64 algebra: a kernel that is wrong has no speed."""
    expected = x[0, 0].astype(np.float64) @ S.T.astype(np.float64)
    assert np.abs(found.ravel()[: expected.size] - expected).max() <= tolerance * np.abs(expected).max() + 1e-12


def dense_model(W: np.ndarray, copies: int) -> Any:
    """ONNX: x W^T, ``copies`` times."""
    weights = np.ascontiguousarray(W.T)
    return _model(W.shape, copies, "MatMul", lambda i: {"w": np.roll(weights, i, axis=0)})


def int8_model(W: np.ndarray, copies: int) -> Any:
    """ONNX: x W^T with weights in int8, a scale for each output, and activations quantised at each call."""
    scale = np.abs(W).max(axis=1) / 127
    weights = np.ascontiguousarray(np.round(W / scale[:, None]).astype(np.int8).T)
    others = {"scale": scale, "zero": np.zeros_like(scale, np.int8)}
    return _model(
        W.shape, copies, "DynamicQuantizeMatMul", lambda i: {"w": np.roll(weights, i, axis=0)} | others, "com.microsoft"
    )


def sparse_model(S: np.ndarray, copies: int, float16: bool, low_rank: tuple[np.ndarray, np.ndarray] | None = None) -> Any:
    """ONNX: x S^T as the operator SparseMatMul, or x (S + U V)^T, with a bias then, and U [b, n/b, r] and V [b, r, k]."""
    from vitoats.export.sparse_matmul import DOMAIN, NAME
    from vitoats.format import bitmask

    values, mask = bitmask.pack(S)
    values = values.astype(np.float16) if float16 else values
    starts = np.concatenate([[0], np.cumsum(np.count_nonzero(S, axis=1))])

    def constants(i: int) -> dict[str, np.ndarray]:
        i %= len(S)
        found = {"values": np.roll(values, -starts[i]), "mask": np.roll(mask, -i, axis=0)}
        if low_rank is not None:
            found["bias"] = np.zeros(len(S), np.float32)
            found |= {name: np.roll(term, i, axis=-1) for name, term in zip("UV", low_rank, strict=True)}
        return found

    return _model(S.shape, copies, NAME, constants, DOMAIN, in_features=S.shape[1])


def _model(
    shape: tuple[int, ...],
    copies: int,
    op: str,
    constants: Callable[[int], dict[str, np.ndarray]],
    domain: str = "",
    **attributes: int,
) -> Any:
    """Several products of the same x, each with weights of its own: ONNX Runtime keeps one of those that are equal.

    Of all but the first only one number is handed on, so that outputs reuse memory.
    """
    from onnx import TensorProto, helper, numpy_helper

    from vitoats.export.onnx_file import IR_VERSION
    from vitoats.export.sparse_matmul import DOMAIN, OPSET

    n, k = shape
    indices = [numpy_helper.from_array(np.array(v, np.int64), name) for v, name in (([0, 0, 0], "from"), ([1, 1, 1], "to"))]
    graph = helper.make_graph([], "op", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", "t", k])], [], indices)
    for i in range(copies):
        tensors = [numpy_helper.from_array(array, f"{name}{i}") for name, array in constants(i).items()]
        graph.initializer.extend(tensors)
        graph.node.append(helper.make_node(op, ["x", *(t.name for t in tensors)], [f"y{i}"], domain=domain, **attributes))
        if i:
            graph.node.append(helper.make_node("Slice", [f"y{i}", "from", "to"], [f"one{i}"]))
    graph.output.append(helper.make_tensor_value_info("y0", TensorProto.FLOAT, ["b", "t", n]))
    if copies > 1:
        graph.node.append(helper.make_node("Concat", [f"one{i}" for i in range(1, copies)], ["others"], axis=0))
        graph.output.append(helper.make_tensor_value_info("others", TensorProto.FLOAT, ["c", 1, 1]))
    opsets = [helper.make_opsetid(domain, version) for domain, version in (("", OPSET), (DOMAIN, 1), ("com.microsoft", 1))]
    return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)


def open_model(model: Any, threads: int) -> Any:
    """A session with the native operator; the worker threads sleep between runs, so that sessions in turns do not disturb."""
    import onnxruntime as ort

    from vitoats.runtime.library import register

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")
    register(options)
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def last_level_cache() -> int:
    """Bytes of the processor's last level of cache; 32 MiB where it does not say."""
    levels = Path("/sys/devices/system/cpu/cpu0/cache")
    sizes = [int(f.read_text().strip().rstrip("K")) * 1024 for f in levels.glob("index*/size")]
    return max(sizes, default=32 * 2**20)


def _shape(text: str) -> Shape:
    return Shape(*_product(text, "two whole numbers of 1 or more, such as 768x3072"))


def _tokens(text: str) -> Tokens:
    return Tokens(*_product(text if "x" in text else f"1x{text}", "a number of tokens, such as 197 or 8x197"))


def _product(text: str, words: str) -> tuple[int, int]:
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(p.isdigit() and int(p) > 0 for p in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not {words}")
    return int(parts[0]), int(parts[1])
