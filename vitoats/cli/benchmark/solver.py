"""Times the exact OATS solver (a full SVD each step) against the fast one, on the layer shapes of one block of a model.

    python tools/benchmark.py solver --model vit_base_patch16_224
    python tools/benchmark.py solver --model dinov2s_derived --threads 1

On noise images: a solver's time does not depend on them.
"""

from typing import TYPE_CHECKING, Any

from vitoats.cli import common, config_file, flags
from vitoats.common.machine import processor

if TYPE_CHECKING:
    from vitoats.benchmark.solver import SolverTimes

N_IMAGES = 4  # noise images: a solver's time does not depend on the number of images


def main(argv: list[str]) -> dict[str, Any]:
    """Times exact and fast OATS on all linear layers of one block, without early stopping."""
    parser = flags.parser("benchmark solver", __doc__)
    flags.add_model_flags(parser)
    flags.add_compute_flags(parser, device=False)
    parser.add_argument("--block", type=flags.non_negative, default=0, metavar="I", help="which block")
    parser.add_argument("--compression", type=float, default=0.5, metavar="RHO", help="share of the weights to remove")
    parser.add_argument(
        "--rank-ratio", type=float, default=0.2, metavar="KAPPA", help="share of the kept weights for the low-rank term"
    )
    parser.add_argument("--iterations", type=int, default=80, metavar="N", help="alternating steps")
    args = config_file.parse(parser, argv)

    from vitoats.benchmark.matrices import dense_matrices
    from vitoats.benchmark.solver import compare_solvers, together
    from vitoats.benchmark.weights import load_or_randomise
    from vitoats.common.devices import set_threads
    from vitoats.report.tables import print_table

    threads = set_threads(args.threads)
    loaded, weights = load_or_randomise(common.source(args))
    common.log.info("weights: %s; inputs: those of %d noise images; %d threads, %s", weights, N_IMAGES, threads, processor())
    images = iter([loaded.inputs.noise(N_IMAGES, args.seed)])
    matrices = dense_matrices(loaded, images, N_IMAGES, N_IMAGES, [args.block], "diagonal")
    with common.Bar("layer", args.quiet) as bar:
        rows = compare_solvers(matrices, args.compression, args.rank_ratio, args.iterations, args.seed, bar.update)
    total, shapes = together(rows), [list(matrix.weight.shape) for matrix in matrices]
    print_table(
        f"OATS, {args.iterations} steps, {args.compression:.0%} removed, rank ratio {args.rank_ratio:g}, {weights}",
        ("layer", "shape", "exact s", "fast s", "speedup", "objective gap"),
        [_cells(row, f"{d_out} x {d_in}") for row, (d_out, d_in) in zip(rows, shapes, strict=True)] + [_cells(total, "")],
    )
    return {
        "model": args.model,
        "weights": weights,
        "iterations": args.iterations,
        "threads": threads,
        "exact_seconds": round(total.exact_seconds, 3),
        "fast_seconds": round(total.fast_seconds, 3),
        "speedup": round(total.speedup, 2),
        "objective_gap": total.objective_gap,
        "shapes": shapes,
    }


def _cells(row: "SolverTimes", shape: str) -> tuple[str, ...]:
    seconds = f"{row.exact_seconds:.2f}", f"{row.fast_seconds:.2f}"
    return row.name, shape, *seconds, f"{row.speedup:.1f}x", f"{row.objective_gap:+.3%}"
