"""Where the time of an exported file goes, by kind of node: the linear layers, and what is left beside them.

    python tools/benchmark.py profile fast.onnx
    python tools/benchmark.py profile fast.onnx --threads 1

ONNX Runtime's own profile is read; writing it takes a little time for each node, so the sum is more than a run takes otherwise.
"""

import dataclasses
from pathlib import Path
from typing import Any

from vitoats.cli import config_file, flags
from vitoats.common.amx import refuse_amx
from vitoats.common.machine import cores, processor


def main(argv: list[str]) -> dict[str, Any]:
    """Parses flags, measures; returns the JSON line."""
    parser = flags.parser("benchmark profile", __doc__)
    parser.add_argument("file", type=Path, metavar="FILE", help="an ONNX file")
    parser.add_argument("--batch", type=flags.positive, default=1, metavar="N", help="images at a time; 1")
    parser.add_argument("--threads", type=flags.positive, metavar="N", help="CPU threads; all cores")
    flags.add_no_amx(parser)
    args = config_file.parse(parser, argv)
    if args.no_amx:
        refuse_amx()

    from vitoats.benchmark.profile import profile
    from vitoats.report.tables import print_table
    from vitoats.runtime import library

    threads = args.threads or cores()
    rows = profile(args.file, args.batch, threads)
    ms, linear_ms = sum(row.ms for row in rows), sum(row.ms for row in rows if row.linear)
    kernels = library.isa() if library.library_path() else None
    print_table(
        f"{args.file.name}, batch {args.batch}, {threads} threads: {ms:.2f} ms, of which {linear_ms:.2f} ms are linear layers",
        ("kind of node", "linear layers", "nodes", "ms", "%"),
        [(row.kind, "yes" if row.linear else "", f"{row.nodes}", f"{row.ms:.3f}", f"{row.share:.1f}") for row in rows],
    )
    return {
        "file": str(args.file),
        "processor": processor(),
        "isa": kernels,
        "batch": args.batch,
        "threads": threads,
        "ms": round(ms, 4),
        "linear_ms": round(linear_ms, 4),
        "rows": [dataclasses.asdict(row) for row in rows],
    }
