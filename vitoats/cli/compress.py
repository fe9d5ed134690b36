"""Compresses a vision transformer with calibration images and writes a folder.

    python tools/compress.py --model dinov2_vitb14 --data-dir IMAGES --compression 0.5 --output runs/vitb14
    python tools/compress.py --model dinov2s_derived --rank-ratio 0.25 --output runs/demo      (weights and images embedded)

The folder opens with vitoats.load, tools/eval_imagenet.py and tools/export_onnx.py; with --format dense in timm as local-dir:.
"""

import dataclasses
import time
from argparse import SUPPRESS, Namespace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitoats.cli import common
from vitoats.errors import InputError

if TYPE_CHECKING:
    from vitoats.methods.registry import Method
    from vitoats.pipeline import CompressionReport

METHOD_FLAGS = ("compression", "rank_ratio", "iterations", "pattern", "solver", "tolerance")


def main(argv: list[str]) -> dict[str, Any]:
    """Parses flags, compresses, writes the folder, prints the table of layers; returns the JSON line."""
    args = common.parse(make_parser(), argv)
    result, report = run(args)
    if not args.quiet:
        from vitoats.checkpoint import about
        from vitoats.report.tables import count_table, layer_table, skipped_lines

        layer_table(report)
        for line in skipped_lines(report):
            print(line)
        said = about(args.output)
        count_table(said["counts_before"], said["counts"])
    return result


def run(args: Namespace) -> tuple[dict[str, Any], "CompressionReport"]:
    """Compresses and writes the folder; returns the JSON line and the figures of all layers."""
    common.check_output_folder(args.output, args.overwrite)

    import vitoats.methods  # noqa: F401  (fills the table of methods)
    from vitoats.counts import count
    from vitoats.data.images import SAMPLE, calibration_batches, open_images
    from vitoats.methods.registry import get_method
    from vitoats.models.names import EMBEDDED
    from vitoats.pipeline import compress
    from vitoats.resume import BlockStore, fingerprint

    method = get_method(args.method)
    config = make_config(args, method)
    if args.data_dir is None:
        if args.model != EMBEDDED:
            raise InputError("there are no images to calibrate on: give --data-dir a folder of images")
        args.data_dir = SAMPLE
    common.set_threads(args.threads)
    device = common.check_device(args.device)
    start = time.perf_counter()
    loaded = common.load(args)
    dataset = open_images(args.data_dir, "train", loaded.preprocessing.transform())
    nsamples = min(args.nsamples, len(dataset))
    buffers = {name for name, _ in loaded.timm_model.named_buffers()}
    before = count(loaded.timm_model.state_dict(), not_parameters=buffers)

    settings = {
        "model": args.model,
        "method": args.method,
        "method_digest": method.digest,
        "config": dataclasses.asdict(config),
        "fused_qkv": args.fused_qkv,
        "preprocessing": loaded.preprocessing.to_dict(),
        "calibration": {"data": args.data_dir, "nsamples": args.nsamples, "seed": args.seed, "images": len(dataset)},
    }
    store = BlockStore(
        args.output.with_name(args.output.name + ".partial"), fingerprint(loaded.timm_model, settings), args.resume
    )
    args.output.parent.mkdir(parents=True, exist_ok=True)
    try:
        with common.Bar("block", args.quiet) as bar:
            report = compress(
                loaded.timm_model.to(device),
                calibration_batches(dataset, args.nsamples, args.seed, args.batch_size, args.workers),
                method=args.method,
                config=config,
                img_size=loaded.preprocessing.img_size,
                nsamples=nsamples,
                batch_size=args.batch_size,
                fused_qkv=args.fused_qkv,
                memory_limit=None if args.memory_limit is None else args.memory_limit * 1e9,
                scratch=args.output.parent,
                state=store,
                progress=bar.update,
            )
    except BaseException:
        store.settle()
        raise
    about = {"weights": loaded.weights, **settings, **report.to_dict(), "counts_before": dataclasses.asdict(before)}
    from vitoats.checkpoint import WEIGHTS, save_checkpoint

    save_checkpoint(loaded, args.output, about, dense=args.format == "dense", overwrite=args.overwrite)
    store.remove()
    result = {
        "model": args.model,
        "method": args.method,
        "compression": round(report.compression, 6),
        "rank_ratio": getattr(config, "rank_ratio", None),
        "pattern": getattr(config, "pattern", None),
        "format": args.format,
        "n_layers": len(report.layers),
        "n_images": report.n_images,
        "model_mb": round((args.output / WEIGHTS).stat().st_size / 1e6, 3),
        "seconds": round(time.perf_counter() - start, 1),
        "output": str(args.output),
    }
    return result, report


def make_config(args: Namespace, method: "Method") -> Any:
    """The method's config: flags that were given, then --method-options, then the method's own defaults.

    Raises:
        InputError: the method has no such setting, or its value is wrong.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(method.config)}
    given: dict[str, Any] = {}
    for name in METHOD_FLAGS:
        if name in args:  # flags without a default are absent when not given
            if name not in defaults:
                raise InputError(f"the method {args.method} takes no --{name.replace('_', '-')}: leave it out")
            given[name] = getattr(args, name)
    if "seed" in defaults:
        given["seed"] = args.seed
    for item in args.method_options.split(",") if args.method_options else []:
        name, _, text = item.partition("=")
        if name not in defaults or name in ("seed", *METHOD_FLAGS):
            own = [n for n in defaults if n not in ("seed", *METHOD_FLAGS)]
            raise InputError(f"the method {args.method} has no option {name!r}: it has {', '.join(own) or 'none'}")
        given[name] = _value(name, text, type(defaults[name]))
    if ":" in str(given.get("pattern", defaults.get("pattern"))):
        given.setdefault("compression", None)  # N:M implies it
    return method.config(**given)


def _value(name: str, text: str, kind: type) -> Any:
    """Reads an option's value as what its default is."""
    try:
        return {"true": True, "false": False}[text] if kind is bool else kind(text)
    except (KeyError, ValueError):
        raise InputError(f"--method-options: {name}={text} is wrong: give {name} a value of type {kind.__name__}") from None


def make_parser() -> common.ArgumentParser:
    """The flags of compress."""
    parser = common.parser("compress", (__doc__ or "").split("\n")[0])
    common.add_model_flags(parser)
    common.add_data_flags(parser, batch_size=64)
    common.add_compute_flags(parser)
    parser.add_argument("--config", type=Path, metavar="FILE", help="a YAML recipe; a flag beats it")
    parser.add_argument("--output", "-o", type=Path, required=True, metavar="DIR", help="the folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder if compress wrote it")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run of the same command")
    parser.add_argument("--format", choices=("factored", "dense"), default="factored", help="dense folds S + UV; timm opens it")
    parser.add_argument(
        "--method",
        default="oats",
        help="oats, wanda, magnitude, sparsegpt, mrp, alps, dsnot, svd, or ./file.py:name for your own; see docs/methods.md",
    )
    parser.add_argument(
        "--method-options", default="", metavar="NAME=VALUE,...", help="further settings of the method; see docs/methods.md"
    )
    # what a method is not told it decides itself, so these have no default here
    method = partial(parser.add_argument, default=SUPPRESS)
    method(
        "--compression", type=float, metavar="RHO", help="share of the weights to remove (default: 0.5 unless N:M implies it)"
    )
    method(
        "--rank-ratio",
        type=float,
        metavar="KAPPA",
        help="oats: share of the kept weights for the low-rank term (default: 0.2)",
    )
    method("--iterations", type=int, metavar="N", help="iterations at most (default: oats 80, alps 300, dsnot 50)")
    method(
        "--pattern",
        help="row, layer, blocks 1x2 or 1x4 along the input, or N:M such as 2:4, of which N are kept "
        "(default: row; layer for magnitude, sparsegpt, mrp and alps)",
    )
    method("--solver", choices=("fast", "exact"), help="oats: exact takes full SVDs, as published (default: fast)")
    method("--tolerance", type=float, help="oats: stop below this relative gain a step; 0 never stops early (default: 1e-4)")
    parser.add_argument("--fused-qkv", action="store_true", help="decompose a fused qkv as one matrix, not q, k and v apart")
    parser.add_argument(
        "--nsamples", type=common.positive, default=512, metavar="N", help="calibration images, drawn at random"
    )
    parser.add_argument(
        "--memory-limit",
        type=common.positive_number,
        metavar="GB",
        help="above it, hidden states go to a mapped file beside --output",
    )
    return parser
