"""Exports a model or a compressed folder to ONNX.

    python tools/export_onnx.py runs/vitb14 -o vitb14.onnx
    python tools/export_onnx.py --model vit_base_patch16_224 -o dense.onnx

A compressed layer becomes a SparseMatMul node, whose function travels in the file, beside plain MatMul nodes for its low-rank
term. --inline writes standard operators only, --dense folds S + UV. The batch is dynamic, the image size fixed.
"""

import time
from pathlib import Path
from typing import Any

from vitoats.cli import common
from vitoats.errors import InputError


def main(argv: list[str]) -> dict[str, Any]:
    """Parses flags, exports; returns the JSON line."""
    parser = common.parser("export_onnx", (__doc__ or "").split("\n")[0])
    parser.add_argument("folder", nargs="?", metavar="DIR", help="a folder that compress wrote (or use --model)")
    common.add_model_flags(parser)
    parser.add_argument("--output", "-o", type=Path, required=True, metavar="FILE", help="the .onnx file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it exists")
    forms = parser.add_mutually_exclusive_group()
    forms.add_argument("--inline", action="store_true", help="standard operators only, for other runtimes")
    forms.add_argument("--dense", action="store_true", help="fold S + UV into plain weights")
    next(a for a in parser._actions if a.dest == "model").required = False
    args = common.parse(parser, argv)
    name = args.folder or args.model
    if name is None or (args.folder and args.model):
        raise InputError("name one model to export: a folder, or --model NAME")
    if args.output.suffix != ".onnx":
        raise InputError(f"{args.output} does not end in .onnx: give --output a file such as model.onnx")
    common.check_output_file(args.output, args.overwrite)

    from vitoats.checkpoint import about, is_checkpoint
    from vitoats.export.onnx_file import Form, export_onnx

    start = time.perf_counter()
    args.model = name
    loaded = common.load(args)
    said = about(Path(name)) if is_checkpoint(Path(name)) else {}
    described = {"model": said.get("model", name)} | {k: said[k] for k in ("method", "compression") if k in said}
    form: Form = "inline" if args.inline else "dense" if args.dense else "sparse"
    common.log.info("tracing")
    proto = export_onnx(loaded, args.output, form, described)
    return {
        "model": name,
        "output": str(args.output),
        "form": form,
        "onnx_mb": round(args.output.stat().st_size / 1e6, 3),
        "sparse_nodes": sum(node.domain == "vitoats" for node in proto.graph.node),
        "img_size": loaded.preprocessing.img_size,
        "seconds": round(time.perf_counter() - start, 1),
    }
