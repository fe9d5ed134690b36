"""The main job on embedded weights and images: compress, export, run in ONNX Runtime, compare.

    python tools/demo.py                    (or: make demo)

Compresses dinov2s_derived with OATS at 50 %, exports it and the dense model, and measures both as they would be deployed.
"""

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from vitoats.cli import common
from vitoats.cli import compress as compress_command

COMPRESSION, RANK_RATIO = 0.5, 0.25


def main(argv: list[str]) -> dict[str, Any]:
    """Parses flags, runs the demo; returns the JSON line."""
    parser = common.parser("demo", (__doc__ or "").split("\n")[0])
    parser.add_argument("--threads", type=common.non_negative, default=0, metavar="N", help="CPU threads; 0 takes all cores")
    parser.add_argument("--output", "-o", type=Path, metavar="DIR", help="keep the compressed folder and both ONNX files here")
    args = common.parse(parser, argv)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="vitoats-demo-") as scratch:
        if args.output is None:
            return run_demo(Path(scratch), args.threads, args.quiet, start)
        common.check_output_folder(args.output)
        args.output.mkdir(parents=True, exist_ok=True)
        return run_demo(args.output, args.threads, args.quiet, start)


def run_demo(folder: Path, threads: int, quiet: bool, start: float) -> dict[str, Any]:
    """Compresses, exports and evaluates in ``folder``; returns the JSON line."""
    from vitoats.checkpoint import about
    from vitoats.export.onnx_file import export_onnx
    from vitoats.models.loading import load_model
    from vitoats.models.names import EMBEDDED
    from vitoats.report.tables import print_table
    from vitoats.runtime.inference import median_latency_ms, session

    compressed = folder / "compressed"
    flags = f"--model {EMBEDDED} --compression {COMPRESSION} --rank-ratio {RANK_RATIO} --threads {threads}"
    parser = compress_command.make_parser()
    args = parser.parse_args([*flags.split(), "--output", str(compressed)] + ["--quiet"] * quiet)
    done, _ = compress_command.run(args)
    files = {"dense": folder / "dense.onnx", "compressed": folder / "compressed.onnx"}
    said = about(compressed)
    for name, source in (("dense", EMBEDDED), ("compressed", str(compressed))):
        common.log.info("exporting the %s model to ONNX", name)
        described = {"model": EMBEDDED} | ({k: said[k] for k in ("method", "compression")} if name == "compressed" else {})
        export_onnx(load_model(source), files[name], about=described)

    dense, small = (evaluate_file(name, file, threads, quiet) for name, file in files.items())
    image = np.random.default_rng(0).standard_normal((1, 3, dense["img_size"], dense["img_size"]), np.float32)
    latency, latency_small = median_latency_ms([session(file, threads) for file in files.values()], image)
    seconds = round(time.perf_counter() - start, 1)
    print_table(
        f"{EMBEDDED}, OATS, {done['compression']:.1%} of the block weights removed, rank ratio {RANK_RATIO}; "
        f"{dense['n_images']} images",
        ("ONNX Runtime, CPU", "top-1 %", "file MB", "batch 1, ms"),
        [
            (name, f"{row['top1']:.2f}", f"{row['megabytes']:.2f}", f"{ms:.2f}")
            for name, row, ms in (("dense", dense, latency), ("compressed", small, latency_small))
        ],
    )
    print(
        "The compressed file holds values, bit masks and low-rank factors. Stock ONNX Runtime unpacks S to dense weights when"
    )
    print(f"it loads the file and computes U V on top: smaller to ship, not faster yet. {seconds:.0f} seconds in all.")
    return {
        "model": EMBEDDED,
        "method": done["method"],
        "compression": done["compression"],
        "top1_dense": dense["top1"],
        "top1": small["top1"],
        "n_images": dense["n_images"],
        "onnx_mb_dense": dense["megabytes"],
        "onnx_mb": small["megabytes"],
        "latency_ms_dense": round(latency, 2),
        "latency_ms": round(latency_small, 2),
        "seconds": seconds,
    }


def evaluate_file(name: str, file: Path, threads: int, quiet: bool) -> dict[str, Any]:
    """Accuracy on the sample's test images, and size, of an ONNX file."""
    from vitoats.data.images import SAMPLE, batches, open_images
    from vitoats.evaluate.accuracy import evaluate
    from vitoats.evaluate.target import onnx_target

    target = onnx_target(str(file), None, threads)
    dataset = open_images(SAMPLE, "test", target.preprocessing.transform())
    order = list(range(len(dataset)))
    with common.Bar(f"evaluating {name}", quiet) as bar:
        stream = batches(dataset, order, batch_size=50, workers=0)
        result = evaluate(target.predict, stream, len(dataset.classes), lambda n: bar.update(n, len(order)))
    return {
        "top1": round(result.top1, 2),
        "n_images": result.n_images,
        "img_size": target.preprocessing.img_size,
        "megabytes": round(file.stat().st_size / 1e6, 2),
    }
