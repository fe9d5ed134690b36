"""Measures the cost of a model's linear layers, for budgets in milliseconds: benchmark op with --model.

python tools/benchmark.py op --model dinov2_vitb14 --threads 2 --results-file costs.json
python tools/compress.py --model dinov2_vitb14 --method oats-h --speedup 1.5 --cost-table costs.json ...
"""

from argparse import Namespace
from typing import Any

from vitoats.cli import common
from vitoats.common.errors import InputError
from vitoats.common.machine import cores


def run(args: Namespace) -> dict[str, Any]:
    """Measures the model that the flags name; returns the JSON line, which is the cost table."""
    if args.threads and len(args.threads) > 1:
        raise InputError("a cost table is for one number of threads: give --threads once")
    threads = args.threads[0] if args.threads else cores()

    from vitoats.benchmark.costs import measure_costs
    from vitoats.benchmark.weights import load_or_randomise

    loaded, weights = load_or_randomise(common.source(args))
    with common.Bar("measuring", args.quiet) as bar:
        table = measure_costs(loaded, args.batch, threads, args.seed, bar.update)
    _print(f"{args.model} ({weights}), batch {args.batch}", table)
    return {"model": args.model, "weights": weights, **table}


def _print(measured: str, table: dict[str, Any]) -> None:
    from vitoats.report.tables import print_table

    print_table(
        f"{measured}, {table['threads']} threads: dense {table['dense_ms']:.2f} ms, sparse {table['sparse_ms']:.2f} ms, "
        f"sparse in int8 {table['sparse_int8_ms']:.2f} ms, of which {table['rest_ms']:.2f} and {table['rest_int8_ms']:.2f} ms "
        f"are not linear layers",
        ("n x k", "layers", "tokens", "zeros %", "rank", "dense ms", "sparse ms", "dense int8 ms", "sparse int8 ms"),
        [
            (
                f"{row['n']} x {row['k']}",
                f"{row['layers']}",
                f"{row['tokens']}",
                f"{row['zeros']:g}",
                f"{row['blocks']} x {row['rank']}",
                f"{row['dense_ms']:.3f}",
                f"{row['sparse_ms']:.3f}",
                f"{row['dense_int8_ms']:.3f}",
                f"{row['sparse_int8_ms']:.3f}",
            )
            for row in table["rows"]
        ],
    )
