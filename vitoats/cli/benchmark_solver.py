"""Times the exact OATS solver (a full SVD each step) against the fast one, on the true shapes of one block of a model."""

import statistics
import time
from collections.abc import Mapping
from typing import Any

from vitoats.cli import common, config_file, flags
from vitoats.common.errors import InputError

REPEATS = {"exact": 1, "fast": 3}  # runs of each solver, of which the median counts


def main(argv: list[str]) -> dict[str, Any]:
    """Times exact and fast OATS over all linear layers of one block; early stop is off."""
    parser = flags.parser("benchmark solver", "exact against fast OATS on the shapes of one block")
    flags.add_model_flags(parser)
    flags.add_compute_flags(parser)
    parser.add_argument("--block", type=flags.non_negative, default=0, metavar="I", help="which block")
    parser.add_argument("--compression", type=float, default=0.5, metavar="RHO", help="share of the weights to remove")
    parser.add_argument(
        "--rank-ratio", type=float, default=0.2, metavar="KAPPA", help="share of the kept weights for the low-rank term"
    )
    parser.add_argument("--iterations", type=int, default=80, metavar="N", help="alternating steps")
    args = config_file.parse(parser, argv)

    from vitoats.calibration.hidden_states import HiddenStates
    from vitoats.calibration.moments import input_statistics
    from vitoats.calibration.walk import walk
    from vitoats.methods.oats import OATSConfig, Solver, oats
    from vitoats.models.adapter import adapt
    from vitoats.report.tables import print_table

    threads = common.set_threads(args.threads)
    loaded, weights = common.load_or_randomise(args)
    common.log.info(
        "weights: %s; inputs: those of 4 noise images; %d threads, %s",
        weights,
        threads,
        common.processor(),
    )
    adapter = adapt(loaded.timm_model, loaded.inputs)
    if args.block >= len(adapter.blocks):
        raise InputError(f"{args.model} has {len(adapter.blocks)} blocks: give --block a smaller number")
    hidden = HiddenStates.collect(adapter, iter([loaded.inputs.noise(4, args.seed)]), 4, 4)
    *_, block = walk(adapter.blocks[: args.block + 1], hidden)
    inputs = input_statistics(hidden, block)

    solvers: tuple[Solver, ...] = ("exact", "fast")
    rows, seconds, objectives, shapes = [], dict.fromkeys(solvers, 0.0), dict.fromkeys(solvers, 0.0), []
    work = [
        (f"{linear.name}[{i}]" if linear.parts > 1 else linear.name, part, inputs[linear.name])
        for linear in block.linears
        for i, part in enumerate(linear.module.weight.float().chunk(linear.parts))
    ]
    settings: dict[str, Any] = {"compression": args.compression, "rank_ratio": args.rank_ratio, "seed": args.seed}
    settings |= {"iterations": args.iterations, "tolerance": 0.0}
    with common.Bar("layer", args.quiet) as bar:
        for done, (name, weight, moments) in enumerate(work):
            bar.update(done, len(work), name)
            took, reached = {}, {}
            for which in solvers:
                config = OATSConfig(**settings, solver=which)
                runs = []
                for _ in range(REPEATS[which]):
                    start = time.perf_counter()
                    reached[which] = oats(weight, moments, config).objective
                    runs.append(time.perf_counter() - start)
                took[which] = statistics.median(runs)
                seconds[which] += took[which]
                objectives[which] += reached[which]
            shapes.append(list(weight.shape))
            rows.append(_solver_row(name, f"{weight.shape[0]} x {weight.shape[1]}", took, reached))
    rows.append(_solver_row("all", "", seconds, objectives))
    print_table(
        f"OATS, {args.iterations} steps, {args.compression:.0%} removed, rank ratio {args.rank_ratio:g}, {weights}",
        (
            "layer",
            "shape",
            "exact s",
            "fast s",
            "speedup",
            "objective gap",
        ),
        rows,
    )
    return {
        "model": args.model,
        "weights": weights,
        "iterations": args.iterations,
        "threads": threads,
        "exact_seconds": round(seconds["exact"], 3),
        "fast_seconds": round(seconds["fast"], 3),
        "speedup": round(seconds["exact"] / seconds["fast"], 2),
        "objective_gap": objectives["fast"] / objectives["exact"] - 1,
        "shapes": shapes,
    }


def _solver_row(name: str, shape: str, seconds: Mapping[Any, float], objective: Mapping[Any, float]) -> tuple[str, ...]:
    speedup, gap = seconds["exact"] / seconds["fast"], objective["fast"] / objective["exact"] - 1
    return name, shape, f"{seconds['exact']:.2f}", f"{seconds['fast']:.2f}", f"{speedup:.1f}x", f"{gap:+.3%}"
