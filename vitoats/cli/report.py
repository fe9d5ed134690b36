"""Writes a report page: one HTML file with accuracy, size, speed, layers, weights, attention or text of compressed models.

    python tools/report.py runs/demo -o report.html
    python tools/report.py runs/demo runs/front dense.json --dense dinov2_vits14 --checkpoint dinov2_vits14_pretrain.pth \\
        --data-dir IMAGES -o report.html

Takes folders that compress, compare and front wrote, and files of --results-file. The page needs no network. docs/report.md
has more.
"""

from pathlib import Path
from typing import Any

from vitoats.cli import common, config_file, flags
from vitoats.common.errors import InputError


def main(argv: list[str]) -> dict[str, Any]:
    """Parses flags, writes the page; returns the JSON line."""
    args = config_file.parse(make_parser(), argv)
    from vitoats.common.outputs import check_output_file

    check_output_file(args.output, args.overwrite)

    from vitoats.loading.source import ModelSource
    from vitoats.report.page.make import Report, write_report

    if args.checkpoint and not args.dense:
        raise InputError("--checkpoint holds the weights of --dense: add that, or leave it out")
    dense = ModelSource(name=args.dense, checkpoint=args.checkpoint) if args.dense else None
    report = Report(
        paths=args.paths,
        output=args.output,
        dense=dense,
        data=args.data_dir,
        layers=args.layers,
        n_images=args.num_images,
    )
    with common.Bars(args.quiet) as progress:
        return write_report(report, progress)


def make_parser() -> flags.ArgumentParser:
    """The flags of report."""
    parser = flags.parser("report", (__doc__ or "").split("\n")[0])
    parser.add_argument(
        "paths",
        nargs="+",
        type=Path,
        metavar="DIR",
        help="folders that compress, compare or front wrote; also .json, .jsonl, .csv or .onnx files",
    )
    parser.add_argument("--output", "-o", type=Path, default=Path("report.html"), metavar="FILE", help="the page")
    parser.add_argument("--overwrite", action="store_true", help="replace the page if it exists")
    parser.add_argument(
        "--dense", metavar="NAME", help="the model before compression, as compress takes it; known for embedded models only"
    )
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="a .pth or .safetensors file with its weights")
    parser.add_argument(
        "--data-dir", metavar="DIR", help="images or, for a language model, text; by default the embedded sample"
    )
    parser.add_argument(
        "--layers", type=_names, default=[], metavar="A,B,...", help="layers to look into; those of the middle block by default"
    )
    parser.add_argument("--num-images", type=flags.positive, default=4, metavar="N", help="images with attention maps")
    return parser


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]
