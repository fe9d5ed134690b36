"""Compares methods on a language model by perplexity on texts that did not calibrate.

    python tools/compare_lm.py --model smollm2 --data-dir A.txt --tests C.txt --output table.jsonl
    python tools/compare_lm.py --model smollm2 --data-dir A.txt B.txt --tests C.txt D.txt --methods wanda oats oats-h \
        --compressions 30 50 --patterns own 2:4 --output table.jsonl

Each row is one JSON line in --output; the same command goes on with the rows that are missing.
"""

from argparse import Namespace
from pathlib import Path
from typing import Any

from vitoats.cli import common, config_file, flags, record

METHODS = ("magnitude", "wanda", "sparsegpt", "dsnot", "alps", "mrp", "dass", "oats", "oats-h", "numerical", "int8", "4-bit")


def main(argv: list[str]) -> dict[str, Any]:
    """Parses flags, compares, prints the table; returns the JSON line."""
    return record.recorded("compare_lm", config_file.parse(make_parser(), argv), argv, execute)


def execute(args: Namespace) -> dict[str, Any]:
    """Compares, adds the rows to the file, prints the table; returns the JSON line."""
    from vitoats.common.outputs import check_output_file

    check_output_file(args.output, overwrite=True)  # rows are added to it

    from vitoats.comparison.language import LanguageComparison, compare
    from vitoats.report.comparison import perplexity_table

    comparison = LanguageComparison(
        model=args.model,
        texts=tuple(args.data_dir),
        tests=tuple(args.tests),
        methods=tuple(args.methods),
        patterns=tuple(args.patterns),
        compressions=tuple(percent / 100 for percent in args.compressions),
        output=args.output,
        shared=_shared(args),
        test_tokens=args.test_tokens,
        stride=args.stride or args.seq_len // 2,
    )
    with common.Bars(args.quiet) as progress:
        result = compare(comparison, progress)
    if not args.quiet:
        title = f"{args.model}: perplexity, and how far its logarithm is above the dense model's; ± is one standard error"
        perplexity_table(title, result["rows"])
    return result


def _shared(args: Namespace) -> dict[str, Any]:
    from vitoats.compression.settings import read_options

    given = {name: getattr(args, name) for name in ("nsamples", "seq_len", "batch_size", "device", "threads", "seed", "amp")}
    given |= {
        name: value
        for name in ("target", "allocation", "rank_ratio", "iterations")
        if (value := getattr(args, name)) is not None
    }
    return given | (read_options(args.methods[0], args.method_options) if args.method_options else {})


def make_parser() -> flags.ArgumentParser:
    """The flags of compare_lm."""
    parser = flags.parser("compare_lm", __doc__)
    parser.add_argument("--model", "-m", required=True, metavar="NAME", help="smollm2, hf-hub: or local-dir:")
    parser.add_argument("--data-dir", required=True, nargs="+", metavar="TEXT", help="to calibrate on, in equal shares")
    parser.add_argument("--tests", required=True, nargs="+", metavar="TEXT", help="to measure on")
    parser.add_argument("--methods", nargs="+", default=METHODS, metavar="METHOD", help="also int8 and 4-bit")
    parser.add_argument("--method-options", default="", metavar="NAME=VALUE,...", help="of a single method")
    parser.add_argument("--patterns", nargs="+", default=("own",), metavar="PATTERN", help="own is each method's default")
    parser.add_argument(
        "--compressions",
        nargs="+",
        type=flags.percentage,
        default=(30, 40, 50, 60),
        metavar="PERCENT",
        help="of the blocks' weights, where the pattern does not say how many",
    )
    parser.add_argument("--output", "-o", type=Path, required=True, metavar="FILE", help="JSON lines")
    parser.add_argument("--nsamples", type=flags.positive, default=128, metavar="N", help="calibration windows")
    parser.add_argument("--seq-len", type=flags.positive, default=1024, metavar="N", help="tokens of a window")
    parser.add_argument("--stride", type=flags.positive, metavar="N", help="of the test's window (default: half of it)")
    parser.add_argument("--test-tokens", type=flags.positive, default=60_000, metavar="N", help="tokens of each test")
    parser.add_argument("-b", "--batch-size", type=flags.positive, default=4, metavar="N", help="windows at a time")
    parser.add_argument("--target", choices=("block", "sequential", "dense", "residual"), help="default: the method's own")
    parser.add_argument("--allocation", choices=("uniform", "owl", "sensitivity"), help="default: the method's own")
    parser.add_argument("--rank-ratio", type=float, metavar="KAPPA", help="for methods that have one")
    parser.add_argument("--iterations", type=flags.positive, metavar="N", help="for methods that have them")
    parser.add_argument("--amp", action="store_true", help="calibrate under autocast to bfloat16; tests run in float32")
    flags.add_compute_flags(parser)
    return parser
