"""Compares the solvers of several methods on single matrices: same inputs from the dense model, same budget.

    python tools/benchmark.py layers
    python tools/benchmark.py layers --model dinov2s_derived --methods oats,sparsegpt,oats-h --blocks 3,8 --compression 0.6

The error is ||X (W - W')^T||_F^2 / ||X W^T||_F^2 over all calibration tokens, in float64, regardless of what a method knows
about X. Allocation, targets and refitted biases, which a full compression may add, are not used.
"""

import argparse
import dataclasses
from typing import TYPE_CHECKING, Any

from vitoats.cli import common, config_file, flags

if TYPE_CHECKING:
    from vitoats.benchmark.layers import LayerError
    from vitoats.benchmark.matrices import Matrix


def main(argv: list[str]) -> dict[str, Any]:
    """Parses flags, measures; returns the JSON line."""
    args = config_file.parse(_parser(), argv)

    from vitoats.benchmark.layers import compare_methods, configs_of, geometric_means

    configs = configs_of(args.methods.split(","), args.compression, args.rank_ratio, args.seed)
    from vitoats.common.devices import set_threads

    threads = set_threads(args.threads)
    matrices = _matrices(args)
    with common.Bar("layer", args.quiet) as bar:
        rows = compare_methods(matrices, configs, bar.update)
    means = geometric_means(rows)
    removed = f"{args.compression:.0%} removed"
    _print(f"{args.model}, {removed}, relative squared output errors of {len(matrices)} matrices", rows, means)
    return {
        "model": args.model,
        "compression": args.compression,
        "threads": threads,
        "geometric_means": means,
        "rows": [dataclasses.asdict(row) for row in rows],
    }


def _parser() -> argparse.ArgumentParser:
    parser = flags.parser("benchmark layers", __doc__)
    flags.add_model_flags(parser, required=False)
    flags.add_data_flags(parser, batch_size=64)
    flags.add_compute_flags(parser, device=False)
    parser.set_defaults(model="dinov2s_derived", data_dir="sample")
    parser.add_argument("--methods", default="oats,sparsegpt,alps,oats-h", metavar="A,B,...", help="as --method of compress")
    parser.add_argument("--blocks", type=_numbers, default="3,8", metavar="I,J,...", help="which blocks")
    parser.add_argument("--compression", type=float, default=0.6, metavar="RHO", help="share of the weights to remove")
    parser.add_argument("--rank-ratio", type=float, default=0.25, metavar="KAPPA", help="of methods with a low-rank term")
    parser.add_argument("--nsamples", type=flags.positive, default=512, metavar="N", help="calibration images")
    return parser


def _matrices(args: argparse.Namespace) -> "list[Matrix]":
    from vitoats.benchmark.matrices import dense_matrices
    from vitoats.data.images import calibration_batches, open_images

    loaded = common.load(args)
    dataset = open_images(args.data_dir, "train", loaded.preprocessing.transform())
    images = calibration_batches(dataset, args.nsamples, args.seed, args.batch_size, args.workers)
    return dense_matrices(loaded, images, min(args.nsamples, len(dataset)), args.batch_size, args.blocks, "full")


def _print(title: str, rows: "list[LayerError]", means: dict[str, float]) -> None:
    """Prints a row for each matrix, with a column for each method."""
    from vitoats.report.tables import print_table

    errors: dict[str, list[float]] = {}
    for row in rows:
        errors.setdefault(row.layer, []).append(row.error)
    seconds = [sum(row.seconds for row in rows if row.method == method) for method in means]
    print_table(
        title,
        ("layer", *means),
        [(layer, *(f"{error:.5f}" for error in of)) for layer, of in errors.items()]
        + [("geometric mean", *(f"{mean:.5f}" for mean in means.values()))]
        + [("seconds", *(f"{s:.1f}" for s in seconds))],
    )


def _numbers(text: str) -> list[int]:
    words = text.split(",")
    if not all(word.isdigit() for word in words):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of blocks, such as 3,8")
    return sorted({int(word) for word in words})
