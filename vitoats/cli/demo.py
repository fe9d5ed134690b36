"""The whole workflow on embedded weights and images: compress, export, run in ONNX Runtime, compare.

    python tools/demo.py                    (or: make demo)
    python tools/demo.py --threads 1 --results-file demo.json

Compresses dinov2s_derived with OATS and OATS-H at 50 %. Exports both, the dense model, its int8 version by ONNX Runtime, and
the result of OATS-H rounded to int8, and measures all five files as they would be deployed.
"""

import tempfile
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from vitoats.cli import common, config_file, flags, record

METHODS = ("oats", "oats-h")
INT8 = "oats-h-int8"  # the last of these, rounded
COMPRESSION, RANK_RATIO = 0.5, 0.25
BATCHES = (1, 8)


def main(argv: list[str]) -> dict[str, Any]:
    """Parses flags, runs the demo; returns the JSON line."""
    return record.recorded("demo", config_file.parse(make_parser(), argv), argv, execute)


def make_parser() -> flags.ArgumentParser:
    """The flags of demo."""
    parser = flags.parser("demo", __doc__)
    parser.add_argument("--threads", type=flags.non_negative, default=0, metavar="N", help="CPU threads; 0 takes all cores")
    parser.add_argument("--output", "-o", type=Path, metavar="DIR", help="keep the compressed folders and all ONNX files here")
    return parser


def execute(args: Namespace) -> dict[str, Any]:
    """Runs the demo; returns the JSON line."""
    from vitoats.common.outputs import check_output_folder

    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="vitoats-demo-") as scratch, common.Bars(args.quiet) as progress:
        if args.output is not None:
            check_output_folder(args.output)
            args.output.mkdir(parents=True, exist_ok=True)
        return run_demo(args.output or Path(scratch), args.threads, progress, start)


def run_demo(folder: Path, threads: int, progress: common.Bars, start: float) -> dict[str, Any]:
    """Compresses, exports and evaluates in ``folder``; prints a table and returns the JSON line."""
    from vitoats.comparison.deployed import measure
    from vitoats.compression.run import run
    from vitoats.compression.settings import make_job, with_method
    from vitoats.data.images import SAMPLE
    from vitoats.export.int8 import quantize
    from vitoats.loading.load import load_model
    from vitoats.loading.names import EMBEDDED

    files = {"dense": export(load_model(EMBEDDED), {}, folder / "dense.onnx"), "int8": folder / "int8.onnx"}
    quantize(files["dense"], files["int8"])
    about: dict[str, Any] = {}
    job = make_job(EMBEDDED, threads=threads)
    for method in METHODS:
        common.log.info("compressing with %s", method)
        compressed = run(with_method(job, method, compression=COMPRESSION, rank_ratio=RANK_RATIO), progress=progress)
        about = compressed.about
        compressed.save(folder / method)
        files[method] = export(load_model(str(folder / method)), about, folder / f"{method}.onnx")
    files[INT8] = export(load_model(str(folder / METHODS[-1])), about, folder / f"{INT8}.onnx", int8=True)
    rows = measure(files, SAMPLE, BATCHES, threads, progress)
    seconds = round(time.perf_counter() - start, 1)
    print_rows(rows, about, seconds)
    by_name = {row["method"]: row for row in rows}
    dense, best = by_name["dense"], by_name[METHODS[-1]]
    return {
        "model": EMBEDDED,
        "method": best["method"],
        "compression": round(about["compression"], 6),
        "top1_dense": dense["top1"],
        "top1": best["top1"],
        "n_images": best["n_images"],
        "onnx_mb_dense": dense["onnx_mb"],
        "onnx_mb": best["onnx_mb"],
        "latency_ms_dense": dense["latency_ms"],
        "latency_ms": best["latency_ms"],
        "speedup": best["speedup"],
        "latency_ms_dense_batch8": dense["latency_ms_batch8"],
        "latency_ms_batch8": best["latency_ms_batch8"],
        "speedup_batch8": best["speedup_batch8"],
        "native_nodes": best["native_nodes"],
        "seconds": seconds,
        "rows": [{name: value for name, value in row.items() if name != "native_nodes"} for row in rows],
    }


def export(loaded: Any, about: dict[str, Any], path: Path, int8: bool = False) -> Path:
    """Exports a model, compressed or not, possibly rounded to int8; returns the path of the file."""
    from vitoats.export.onnx_file import described_by, export_onnx
    from vitoats.loading.names import EMBEDDED

    common.log.info("exporting the %s model to ONNX", path.stem)
    export_onnx(loaded, path, about=described_by(about, EMBEDDED), int8=int8)
    return path


def print_rows(rows: list[dict[str, Any]], about: dict[str, Any], seconds: float) -> None:
    """Prints the table on stdout, and the number of layers that run in the native library."""
    from vitoats.loading.names import EMBEDDED
    from vitoats.report.tables import print_table
    from vitoats.runtime import library

    print_table(
        f"{EMBEDDED}, {about['compression']:.1%} of the block weights removed, rank ratio {RANK_RATIO}; "
        f"{rows[0]['n_images']} images",
        ("ONNX Runtime, CPU", "top-1 %", "file MB", *(f"batch {b}, ms" for b in BATCHES), *(f"batch {b}" for b in BATCHES)),
        [
            (
                row["method"],
                f"{row['top1']:.2f}",
                f"{row['onnx_mb']:.2f}",
                *(f"{row[key]:.2f}" for key in ("latency_ms", "latency_ms_batch8")),
                *(f"{row[key]:.2f}x" for key in ("speedup", "speedup_batch8")),
            )
            for row in rows
        ],
    )
    print("OATS' top-1 depends on the last bits, and so on the processor: 71 to 80 % so far (docs/oats.md).")
    native = rows[-1]["native_nodes"]
    if native:
        print(f"{native} nodes of {rows[-1]['method']} run in the native library, with kernels for {library.isa()}.")
    else:
        print("The native library is missing: ONNX Runtime unpacks the sparse weights and runs at dense speed.")
    print(f"{rows[0]['img_size']} px are only 50 tokens: tools/benchmark.py model shows more. {seconds:.0f} seconds in all.")
