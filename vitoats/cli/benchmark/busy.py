"""Times compressions and inference sessions on a busy machine: two at once, with all threads each, against one alone.

    python tools/benchmark.py busy
    python tools/benchmark.py busy --model vit_base_patch16_224 --processes 4 --threads 2

Each process loads its model, then all begin together; the slowest one counts. A ratio of as many as there are processes is
what sharing the cores costs; what is above it is lost to threads that wait for threads without a core. Images are noise, and
zeros and low-rank terms of the exported files random, as in the other benchmarks.
"""

import argparse
import dataclasses
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitoats.cli import common, config_file, flags
from vitoats.common.machine import cores, processor
from vitoats.common.sizes import in_words

if TYPE_CHECKING:
    from vitoats.loading.loaded import LoadedModel

METHODS = ("oats", "oats-h")
COMPRESSION, RANK_RATIO = 0.5, 0.25  # of the exported files; int8 without low rank, as compress makes it
PROCESS = ["-m", "vitoats.cli.benchmark.busy_process"]


def main(argv: list[str]) -> dict[str, Any]:
    """Parses flags, measures; returns the JSON line."""
    args = config_file.parse(_parser(), argv)
    threads = args.threads or cores()

    from vitoats.benchmark.busy import compare_busy
    from vitoats.benchmark.weights import load_or_randomise
    from vitoats.models.adapter import adapt
    from vitoats.models.shapes import layer_shapes
    from vitoats.report.tables import print_table
    from vitoats.runtime import library

    loaded, weights = load_or_randomise(common.source(args))
    tokens = max(shape.tokens for shape in layer_shapes(adapt(loaded.timm_model, loaded.inputs)).values())
    rows = []
    with tempfile.TemporaryDirectory(prefix="vitoats-busy-") as scratch, common.Bar("work", args.quiet) as bar:
        works = _compressions(args, threads) + _inferences(args, threads, loaded, Path(scratch))
        for done, (work, variant, batch, arguments) in enumerate(works):
            bar.update(done, len(works), f"{work} {variant}")
            times = compare_busy([*PROCESS, *arguments], args.processes, args.rounds)
            rows.append({"work": work, "variant": variant, "batch": batch, **dataclasses.asdict(times)})
    isa = library.isa() if library.library_path() else None
    print_table(
        f"{args.model}, {in_words(loaded.inputs.img_size)} px, {tokens} tokens, {weights}; {args.processes} processes with "
        f"{threads} threads each; {processor()}, kernels for {isa or 'nothing'}",
        ("work", "", "batch", "alone s", "together s", "ratio"),
        [
            (row["work"], row["variant"], f"{row['batch']}", f"{row['alone_seconds']:.2f}", f"{row['together_seconds']:.2f}",
             f"{row['ratio']:.2f}x")
            for row in rows
        ],
    )  # fmt: skip
    return {
        "model": args.model,
        "weights": weights,
        "processor": processor(),
        "isa": isa,
        "processes": args.processes,
        "threads": threads,
        "tokens": tokens,
        "rows": rows,
    }


def _parser() -> argparse.ArgumentParser:
    parser = flags.parser("benchmark busy", __doc__)
    parser.add_argument("--model", default="dinov2s_derived", metavar="NAME", help="as for compress; random weights will do")
    parser.add_argument("--processes", type=flags.positive, default=2, metavar="N", help="how many work at once")
    parser.add_argument("--threads", type=flags.non_negative, default=0, metavar="N", help="of each process; 0 takes all cores")
    parser.add_argument("--rounds", type=flags.positive, default=3, metavar="N", help="turns of each; the median counts")
    parser.add_argument("--method", action="append", metavar="NAME", help=f"of the compressions; {' and '.join(METHODS)}")
    parser.add_argument("--iterations", type=flags.positive, default=20, metavar="N", help="of the methods")
    parser.add_argument("--nsamples", type=flags.positive, default=64, metavar="N", help="calibration images")
    parser.add_argument("--batch-size", type=flags.positive, default=32, metavar="N", help="images at a time while compressing")
    parser.add_argument("--batch", type=flags.positive, default=1, metavar="N", help="images of an inference")
    parser.add_argument("--runs", type=flags.positive, default=300, metavar="N", help="inferences")
    return parser


Work = tuple[str, str, int, list[str]]  # what, its variant, the batch size, and the arguments of a process


def _compressions(args: argparse.Namespace, threads: int) -> list[Work]:
    return [
        (
            "compression",
            method,
            args.batch_size,
            ["compression", args.model, f"{threads}", f"{args.batch_size}", method, f"{args.iterations}", f"{args.nsamples}"],
        )
        for method in args.method or METHODS
    ]


def _inferences(args: argparse.Namespace, threads: int, loaded: "LoadedModel", folder: Path) -> list[Work]:
    """Exports the model in float32 and int8."""
    import numpy as np

    from vitoats.benchmark.random_layers import of_budget, with_random_layers
    from vitoats.export.onnx_file import export_onnx
    from vitoats.methods.oats import OATSConfig

    found: list[Work] = []
    for variant, rank_ratio, int8 in (("float32", RANK_RATIO, False), ("int8", 0.0, True)):
        content = of_budget(OATSConfig(compression=COMPRESSION, rank_ratio=rank_ratio))
        compressed = with_random_layers(loaded, content, "row", np.random.default_rng(0))
        file = folder / f"{variant}.onnx"
        export_onnx(compressed, file, int8=int8)
        arguments = ["inference", str(file), f"{threads}", f"{args.batch}", f"{args.runs}"]
        found.append(("inference", variant, args.batch, arguments))
    return found
