"""The main job on embedded weights and images: compress, export, run in ONNX Runtime, compare.

    python tools/demo.py                    (or: make demo)

Compresses dinov2s_derived with OATS and OATS-H at 50 %, exports both and the dense model, and measures all as they would be
deployed.
"""

import tempfile
import time
from pathlib import Path
from typing import Any

from vitoats.cli import common, config_file, flags
from vitoats.cli import compress as compress_command

METHODS = ("oats", "oats-h")
COMPRESSION, RANK_RATIO = 0.5, 0.25
BATCHES = (1, 8)


def main(argv: list[str]) -> dict[str, Any]:
    """Parses flags, runs the demo; returns the JSON line."""
    parser = flags.parser("demo", (__doc__ or "").split("\n")[0])
    parser.add_argument("--threads", type=flags.non_negative, default=0, metavar="N", help="CPU threads; 0 takes all cores")
    parser.add_argument("--output", "-o", type=Path, metavar="DIR", help="keep the compressed folder and both ONNX files here")
    args = config_file.parse(parser, argv)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="vitoats-demo-") as scratch:
        if args.output is None:
            return run_demo(Path(scratch), args.threads, args.quiet, start)
        common.check_output_folder(args.output)
        args.output.mkdir(parents=True, exist_ok=True)
        return run_demo(args.output, args.threads, args.quiet, start)


def run_demo(folder: Path, threads: int, quiet: bool, start: float) -> dict[str, Any]:
    """Compresses, exports and evaluates in ``folder``; returns the JSON line."""
    from vitoats.benchmark.files import compare_files
    from vitoats.loading.names import EMBEDDED
    from vitoats.report.tables import print_table
    from vitoats.runtime import library

    files = {"dense": export("dense", EMBEDDED, folder)}
    done: dict[str, Any] = {}
    for method in METHODS:
        common.log.info("compressing with %s", method)
        argv = f"--model {EMBEDDED} --method {method} --compression {COMPRESSION} --rank-ratio {RANK_RATIO} --threads {threads}"
        args = compress_command.make_parser().parse_args([*argv.split(), "--output", str(folder / method)])
        args.quiet = quiet
        done, _ = compress_command.run(args)
        files[method] = export(method, str(folder / method), folder)

    rows = [{"method": name, **evaluate_file(name, file, threads, quiet)} for name, file in files.items()]
    times = compare_files(list(files.values()), BATCHES, [threads], turn_seconds=0.3)
    for row, found in zip(rows * len(BATCHES), times, strict=True):
        of_batch = "" if found.batch == 1 else f"_batch{found.batch}"
        row[f"latency_ms{of_batch}"] = round(found.ms, 2)
        row[f"speedup{of_batch}"] = found.speedup
    seconds = round(time.perf_counter() - start, 1)
    print_table(
        f"{EMBEDDED}, {done['compression']:.1%} of the block weights removed, rank ratio {RANK_RATIO}; "
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
    native = times[-1].native_nodes
    if native:
        print(f"{native} of {done['n_layers']} layers run in the native sparse operator, with kernels for {library.isa()}.")
    else:
        print("The native library is missing: ONNX Runtime unpacks the sparse weights and runs at dense speed.")
    print(f"{rows[0]['img_size']} px are only 50 tokens: tools/benchmark.py model shows more. {seconds:.0f} seconds in all.")
    dense, best = rows[0], rows[-1]
    return {
        "model": EMBEDDED,
        "method": best["method"],
        "compression": done["compression"],
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
        "native_nodes": native,
        "seconds": seconds,
        "rows": rows,
    }


def export(name: str, source: str, folder: Path) -> Path:
    """Exports a model, or a compressed folder, to ``folder``."""
    from vitoats.export.onnx_file import export_onnx
    from vitoats.loading.checkpoint import about
    from vitoats.loading.load import load_model
    from vitoats.loading.names import EMBEDDED

    common.log.info("exporting the %s model to ONNX", name)
    said = {} if source == EMBEDDED else {key: about(Path(source))[key] for key in ("method", "compression")}
    export_onnx(load_model(source), folder / f"{name}.onnx", about={"model": EMBEDDED} | said)
    return folder / f"{name}.onnx"


def evaluate_file(name: str, file: Path, threads: int, quiet: bool) -> dict[str, Any]:
    """Accuracy on the sample's test images, and size, of an ONNX file."""
    from vitoats.data.images import SAMPLE, batches, open_images
    from vitoats.evaluation.accuracy import evaluate
    from vitoats.evaluation.target import onnx_target

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
        "onnx_mb": round(file.stat().st_size / 1e6, 2),
    }
