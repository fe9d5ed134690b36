"""Times exported files in turns, and compares them with the first file.

    python tools/benchmark.py files dense.onnx fast.onnx
    python tools/benchmark.py files dense.onnx fast.onnx --batch 1 --batch 8 --threads 1 --threads 2

The times are those of one run, in which the files take turns.
"""

import dataclasses
from pathlib import Path
from typing import Any

from vitoats.cli import config_file, flags
from vitoats.common.amx import refuse_amx
from vitoats.common.machine import cores, processor


def main(argv: list[str]) -> dict[str, Any]:
    """Parses flags, measures; returns the JSON line."""
    parser = flags.parser("benchmark files", __doc__)
    several: dict[str, Any] = {"action": "append", "metavar": "X", "type": flags.positive}
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="ONNX files, the dense one first")
    parser.add_argument("--batch", **several, help="images at a time; 1")
    parser.add_argument("--threads", **several, help="CPU threads; all cores")
    flags.add_no_amx(parser)
    args = config_file.parse(parser, argv)
    if args.no_amx:
        refuse_amx()

    from vitoats.benchmark.files import compare_files
    from vitoats.report.tables import print_table

    rows = compare_files(args.files, args.batch or [1], args.threads or [cores()])
    print_table(
        f"ONNX Runtime, {processor()}",
        ("file", "batch", "threads", "ms", "speedup", "native nodes", "MB"),
        [
            (
                Path(row.file).name,
                f"{row.batch}",
                f"{row.threads}",
                f"{row.ms:.2f}",
                f"{row.speedup:.2f}x",
                f"{row.native_nodes}",
                f"{row.file_mb:.2f}",
            )
            for row in rows
        ],
    )
    return {"processor": processor(), "rows": [dataclasses.asdict(row) for row in rows]}
