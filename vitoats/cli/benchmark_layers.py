"""What single matrices lose by several methods, all solvers alone: the same inputs from the dense model, the same budget.

    python tools/benchmark.py layers
    python tools/benchmark.py layers --model dinov2s_derived --methods oats,sparsegpt,oats-h --blocks 3,8 --compression 0.6

The error is ||X (W - W')^T||_F^2 / ||X W^T||_F^2 over all calibration tokens, in float64, whatever a method knows of X.
Allocation, targets and refitted biases, which a whole compression may add, play no part.
"""

import argparse
import dataclasses
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from vitoats.cli import common, config_file, flags
from vitoats.common.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from vitoats.methods.statistics import InputStatistics


def main(argv: list[str]) -> dict[str, Any]:
    """Parses flags, measures; returns the JSON line."""
    parser = flags.parser("benchmark layers", "what single matrices lose by several methods")
    flags.add_model_flags(parser)
    flags.add_data_flags(parser, batch_size=64)
    flags.add_compute_flags(parser)
    parser.set_defaults(model="dinov2s_derived", data_dir="sample")
    next(action for action in parser._actions if action.dest == "model").required = False
    parser.add_argument("--methods", default="oats,sparsegpt,alps,oats-h", metavar="A,B,...", help="as --method of compress")
    parser.add_argument("--blocks", type=_numbers, default=[3, 8], metavar="I,J,...", help="which blocks")
    parser.add_argument("--compression", type=float, default=0.6, metavar="RHO", help="share of the weights to remove")
    parser.add_argument("--rank-ratio", type=float, default=0.25, metavar="KAPPA", help="of methods with a low-rank term")
    parser.add_argument("--nsamples", type=flags.positive, default=512, metavar="N", help="calibration images")
    args = config_file.parse(parser, argv)

    import vitoats.methods  # noqa: F401  (fills the table of methods)
    from vitoats.methods.registry import get_method
    from vitoats.methods.statistics import InputStatistics
    from vitoats.report.tables import print_table

    settings = {"compression": args.compression, "rank_ratio": args.rank_ratio, "seed": args.seed}
    configs = {}
    for name in args.methods.split(","):
        config = get_method(name).config
        known = {field.name for field in dataclasses.fields(config)}
        configs[name] = config(**{key: value for key, value in settings.items() if key in known})
    threads = common.set_threads(args.threads)
    layers = _layers(args)
    rows: list[dict[str, Any]] = []
    with common.Bar("layer", args.quiet) as bar:
        for done, (layer, weight, statistics) in enumerate(layers):
            bar.update(done, len(layers), layer)
            for name, config in configs.items():
                method = get_method(name)
                known_of = statistics if method.needs == "full" else InputStatistics(statistics.second_moment)
                start = time.perf_counter()
                found = method.solve(weight, known_of, config)
                seconds = time.perf_counter() - start
                error = layer_error(weight, found.S + found.U @ found.V, statistics)
                rows.append({"layer": layer, "method": name, "error": error, "seconds": round(seconds, 2)})
    errors = {name: np.array([row["error"] for row in rows if row["method"] == name]) for name in configs}
    means = {name: float(np.exp(np.log(of).mean())) for name, of in errors.items()}
    print_table(
        f"{args.model}, {args.compression:.0%} removed, relative squared output errors of {len(layers)} matrices",
        ("layer", *configs),
        [(layer, *(f"{of[i]:.5f}" for of in errors.values())) for i, (layer, _, _) in enumerate(layers)]
        + [("geometric mean", *(f"{mean:.5f}" for mean in means.values()))]
        + [("seconds", *(f"{sum(row['seconds'] for row in rows if row['method'] == name):.1f}" for name in configs))],
    )
    return {"model": args.model, "compression": args.compression, "threads": threads, "geometric_means": means, "rows": rows}


def layer_error(weight: "Tensor", approximation: "Tensor", statistics: "InputStatistics") -> float:
    """||X (W - W')^T||_F^2 / ||X W^T||_F^2 from H, in float64."""
    from vitoats.methods.registry import output_energy

    return output_energy((weight - approximation).double(), statistics) / output_energy(weight.double(), statistics)


def _layers(args: argparse.Namespace) -> "list[tuple[str, Tensor, InputStatistics]]":
    """Name, weight [d_out, d_in] and inputs of every matrix of the blocks, q, k and v apart, in the dense model."""
    from vitoats.calibration.hidden_states import HiddenStates
    from vitoats.calibration.moments import input_statistics
    from vitoats.calibration.walk import walk
    from vitoats.data.images import calibration_batches, open_images
    from vitoats.models.adapter import adapt

    loaded = common.load(args)
    adapter = adapt(loaded.timm_model, loaded.inputs)
    if max(args.blocks) >= len(adapter.blocks):
        raise InputError(f"{args.model} has {len(adapter.blocks)} blocks: give --blocks smaller numbers")
    dataset = open_images(args.data_dir, "train", loaded.preprocessing.transform())
    stream = calibration_batches(dataset, args.nsamples, args.seed, args.batch_size, args.workers)
    hidden = HiddenStates.collect(adapter, stream, min(args.nsamples, len(dataset)), args.batch_size)
    found = []
    for index, block in enumerate(walk(adapter.blocks[: max(args.blocks) + 1], hidden)):
        if index in args.blocks:
            statistics = input_statistics(hidden, block, "full")
            for linear in block.linears:
                parts = linear.module.weight.detach().float().chunk(linear.parts)
                for i, weight in enumerate(parts):
                    name = f"{linear.name}[{i}]" if linear.parts > 1 else linear.name
                    found.append((name, weight, statistics[linear.name]))
    return found


def _numbers(text: str) -> list[int]:
    words = text.split(",")
    if not all(word.isdigit() for word in words):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of blocks, such as 3,8")
    return sorted({int(word) for word in words})
