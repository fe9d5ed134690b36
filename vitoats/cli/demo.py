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
BATCHES = (1, 8)


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
    from vitoats.runtime import library
    from vitoats.runtime.inference import inference, median_ms, session

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
    sessions = [session(file, threads) for file in files.values()]
    ms = []  # of dense and compressed, for each batch
    for batch in BATCHES:
        images = np.random.default_rng(0).standard_normal((batch, 3, dense["img_size"], dense["img_size"]), np.float32)
        ms.append(median_ms([inference(opened, images) for opened in sessions], turn_seconds=0.3))
    seconds = round(time.perf_counter() - start, 1)
    speedup = [before / after for before, after in ms]
    print_table(
        f"{EMBEDDED}, OATS, {done['compression']:.1%} of the block weights removed, rank ratio {RANK_RATIO}; "
        f"{dense['n_images']} images",
        ("ONNX Runtime, CPU", "top-1 %", "file MB", *(f"batch {b}, ms" for b in BATCHES)),
        [
            (name, f"{row['top1']:.2f}", f"{row['megabytes']:.2f}", *(f"{times[i]:.2f}" for times in ms))
            for i, (name, row) in enumerate((("dense", dense), ("compressed", small)))
        ]
        + [("speedup", "", "", *(f"{x:.2f}x" for x in speedup))],
    )
    native = len(sessions[1].native_nodes)
    if native:
        print(f"{native} of {done['n_layers']} layers run in the native sparse operator, with kernels for {library.isa()}.")
    else:
        print("The native library is missing: ONNX Runtime unpacks the sparse weights and runs at dense speed.")
    print(f"{dense['img_size']} px are only 50 tokens: tools/benchmark.py model shows more. {seconds:.0f} seconds in all.")
    return {
        "model": EMBEDDED,
        "method": done["method"],
        "compression": done["compression"],
        "top1_dense": dense["top1"],
        "top1": small["top1"],
        "n_images": dense["n_images"],
        "onnx_mb_dense": dense["megabytes"],
        "onnx_mb": small["megabytes"],
        "latency_ms_dense": round(ms[0][0], 2),
        "latency_ms": round(ms[0][1], 2),
        "speedup": round(speedup[0], 3),
        "latency_ms_dense_batch8": round(ms[1][0], 2),
        "latency_ms_batch8": round(ms[1][1], 2),
        "speedup_batch8": round(speedup[1], 3),
        "native_nodes": native,
        "seconds": seconds,
    }


def evaluate_file(name: str, file: Path, threads: int, quiet: bool) -> dict[str, Any]:
    """Accuracy on the sample's test images, and size, of an ONNX file."""
    from vitoats.data.images import SAMPLE, batches, open_images
    from vitoats.evaluate.accuracy import evaluate
    from vitoats.evaluate.target import onnx_target

    target = onnx_target(str(file), threads)
    dataset = open_images(SAMPLE, "test", target.preprocessing.transform())
    order = list(range(len(dataset)))
    with common.Bar(f"evaluating {name}", quiet) as bar:
        stream = batches(dataset, order, batch_size=50, workers=0)
        result = evaluate(target.predict, stream, len(dataset.classes), lambda seen: bar.update(seen.n_images, len(order)))
    return {
        "top1": round(result.top1, 2),
        "n_images": result.n_images,
        "img_size": target.preprocessing.img_size,
        "megabytes": round(file.stat().st_size / 1e6, 2),
    }
