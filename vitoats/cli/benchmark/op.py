"""Times one product y = x (S + U V)^T: the native kernels against ONNX Runtime's dense and dynamic int8 MatMul.

    python tools/benchmark.py op
    python tools/benchmark.py op --shape 768x768 --shape 3072x768 --shape 768x3072 --tokens 197 --zeros 62.5 --rank 48
    python tools/benchmark.py op --shape 4096x4096 --tokens 1 --zeros 62.5
    python tools/benchmark.py op --model dinov2_vits14 --results-file costs.json    (a table of costs: costs.py)

Weights are read from memory, as in a whole model: one run cycles through several copies of them, together larger than the
last-level cache. Times are for one product, including all work of the operator, such as transposing or quantising activations.
Each result is checked before it is timed: int8 products against the same weights and activations in float64.

    dense, int8           ONNX Runtime's MatMul and DynamicQuantizeMatMul
    sparse                SparseMatMul
    native-int8           MatMulInt8: all weights
    sparse-int8           SparseMatMulInt8
"""

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitoats.cli import common, config_file, flags
from vitoats.cli.benchmark import costs
from vitoats.common.amx import refuse_amx
from vitoats.common.errors import InputError
from vitoats.common.machine import processor

if TYPE_CHECKING:
    from vitoats.benchmark.op import ProductTimes
    from vitoats.benchmark.products import Pattern

SHAPES = {  # [out, in] of qkv, proj, fc1, fc2
    "ViT-S": ((1152, 384), (384, 384), (1536, 384), (384, 1536)),
    "ViT-B": ((2304, 768), (768, 768), (3072, 768), (768, 3072)),
    "ViT-L": ((3072, 1024), (1024, 1024), (4096, 1024), (1024, 4096)),
}
TOKENS = ("1", "8", "50", "197", "257", "8x50", "8x197")
ZEROS = (50.0, 62.5, 75.0, 87.5)
PATTERNS: "tuple[Pattern, ...]" = ("row", "layer")
THREADS = (1, 2)


def main(argv: list[str]) -> dict[str, Any]:
    """Parses flags, measures; returns the JSON line."""
    args = config_file.parse(_parser(), argv)
    if args.no_amx:
        refuse_amx()
    if args.model:
        _refuse(args, ("shape", "tokens", "zeros", "pattern", "rank", "float16"), "the layers of --model decide it")
        return costs.run(args)
    _refuse(args, ("img_size", "checkpoint", "random_weights"), "it is for --model")

    from vitoats.benchmark.op import Grid, Tokens, time_products
    from vitoats.runtime.library import fma_peak_gflops, isa

    peak = fma_peak_gflops()
    common.log.info("%s, kernels for %s; one core does %.1f GFLOP/s at most", processor(), isa(), peak)
    grid = Grid(
        shapes=args.shape or [shape for shapes in SHAPES.values() for shape in shapes],
        tokens=[Tokens(*tokens) for tokens in args.tokens or map(_tokens, TOKENS)],
        threads=args.threads or THREADS,
        zeros=args.zeros or ZEROS,
        patterns=args.pattern or PATTERNS,
        rank=args.rank,
    )
    with common.Bar("measuring", args.quiet) as bar:
        rows = time_products(grid, peak, args.float16, args.seed, bar.update)
    values = f"values in float{16 if args.float16 else 32}"
    _print(f"y = x (S + U V)^T, rank {args.rank}, {values}, kernels for {isa()}, one core at most {peak:.0f} GFLOP/s", rows)
    return {
        "processor": processor(),
        "isa": isa(),
        "fma_peak_gflops": round(peak, 1),
        "rows": [dataclasses.asdict(row) for row in rows],
    }


def _parser() -> argparse.ArgumentParser:
    parser = flags.parser("benchmark op", __doc__)
    several: dict[str, Any] = {"action": "append", "metavar": "X"}
    parser.add_argument("--shape", type=_shape, **several, help="outputs x inputs, such as 768x3072; those of ViT-S, B and L")
    parser.add_argument("--tokens", type=_tokens, **several, help=f"such as 197, or 8x197 for a batch; {', '.join(TOKENS)}")
    parser.add_argument("--zeros", type=flags.percentage, **several, help="percent of zeros; 50, 62.5, 75, 87.5")
    parser.add_argument("--pattern", choices=PATTERNS, action="append", help="zeros alike in each row, or over the layer; both")
    parser.add_argument("--rank", type=flags.non_negative, default=0, metavar="R", help="of a low-rank term beside S; 0: none")
    parser.add_argument("--threads", type=flags.positive, **several, help="CPU threads; 1 and 2")
    parser.add_argument("--float16", action="store_true", help="the sparse values are float16")
    parser.add_argument("--seed", type=flags.seed, default=0, help="of weights and activations")
    parser.add_argument(
        "--model", metavar="NAME", help="the layers and the whole of this model instead: a table for --cost-table"
    )
    parser.add_argument("--batch", type=flags.positive, default=1, metavar="N", help="with --model: images at a time")
    flags.add_img_size(parser, "with --model: ")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="with --model: a .pth or .safetensors file")
    parser.add_argument("--random-weights", action="store_true", help="with --model: random weights; nothing is fetched")
    flags.add_no_amx(parser)
    return parser


def _refuse(args: argparse.Namespace, names: tuple[str, ...], reason: str) -> None:
    for name in names:
        if getattr(args, name):
            raise InputError(f"--{name.replace('_', '-')} is out of place, {reason}: leave it out")


def _print(title: str, rows: "list[ProductTimes]") -> None:
    from vitoats.report.tables import print_table

    print_table(
        title,
        (
            *("n x k", "tokens", "threads", "zeros %", "pattern", "dense ms", "sparse", "of peak %"),
            *("int8 ms", "native-int8", "sparse-int8"),
        ),
        [
            (
                f"{row.n} x {row.k}",
                row.batch,
                f"{row.threads}",
                f"{row.zeros:g}",
                row.pattern,
                f"{row.dense_ms:.3f}",
                f"{row.speedup:.2f}x",
                f"{row.fma_share:.0f}",
                f"{row.int8_ms:.3f}",
                f"{row.native_int8_speedup:.2f}x",
                f"{row.sparse_int8_speedup:.2f}x",
            )
            for row in rows
        ],
    )


def _shape(text: str) -> tuple[int, int]:
    """Parses the numbers of outputs and inputs."""
    return _product(text, "two whole numbers of 1 or more, such as 768x3072")


def _tokens(text: str) -> tuple[int, int]:
    """Parses the number of images and of tokens per image."""
    return _product(text if "x" in text else f"1x{text}", "a number of tokens, such as 197 or 8x197")


def _product(text: str, words: str) -> tuple[int, int]:
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(p.isdigit() and int(p) > 0 for p in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not {words}")
    return int(parts[0]), int(parts[1])
