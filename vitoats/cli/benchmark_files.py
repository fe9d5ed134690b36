"""Times exported files in turns, the first being what the others are compared with.

python tools/export_onnx.py dinov2s_derived -o dense.onnx
python tools/export_onnx.py runs/fast -o fast.onnx
python tools/benchmark.py files dense.onnx fast.onnx --batch 1 --batch 8 --threads 1 --threads 2
"""

import itertools
from pathlib import Path
from typing import Any

import numpy as np

from vitoats.cli import common, config_file, flags
from vitoats.common.errors import InputError

TURN_SECONDS = 0.5  # of each file before the next has its turn


def main(argv: list[str]) -> dict[str, Any]:
    """Parses flags, measures; returns the JSON line."""
    parser = flags.parser("benchmark files", "exported files against the first of them")
    several: dict[str, Any] = {"action": "append", "metavar": "X", "type": flags.positive}
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="ONNX files, the dense one first")
    parser.add_argument("--batch", **several, help="images at a time; 1")
    parser.add_argument("--threads", **several, help="CPU threads; all cores")
    args = config_file.parse(parser, argv)

    from vitoats.report.tables import print_table
    from vitoats.runtime.inference import inference, median_ms, session

    rows: list[dict[str, Any]] = []
    for threads, batch in itertools.product(args.threads or [common.cores()], args.batch or [1]):
        opened = [session(file, threads) for file in args.files]
        shapes = {tuple(each.get_inputs()[0].shape[1:]) for each in opened}
        if len(shapes) > 1:
            raise InputError(f"the files take images of different shapes, {shapes}: export them with the same --img-size")
        images = np.random.default_rng(0).standard_normal((batch, *shapes.pop()), np.float32)
        times = median_ms([inference(each, images) for each in opened], turn_seconds=TURN_SECONDS)
        rows += [
            {
                "file": str(file),
                "batch": batch,
                "threads": threads,
                "ms": round(ms, 3),
                "speedup": round(times[0] / ms, 3),
                "native_nodes": len(each.native_nodes),
                "file_mb": round(file.stat().st_size / 1e6, 2),
            }
            for file, each, ms in zip(args.files, opened, times, strict=True)
        ]
    print_table(
        f"ONNX Runtime, {common.processor()}",
        ("file", "batch", "threads", "ms", "speedup", "native layers", "MB"),
        [
            (
                Path(row["file"]).name,
                f"{row['batch']}",
                f"{row['threads']}",
                f"{row['ms']:.2f}",
                f"{row['speedup']:.2f}x",
                f"{row['native_nodes']}",
                f"{row['file_mb']:.2f}",
            )
            for row in rows
        ],
    )
    return {"processor": common.processor(), "rows": rows}
