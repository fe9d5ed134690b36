"""Compresses a vision transformer with calibration images, or a language model with text, and writes a folder.

    python tools/compress.py --model dinov2_vitb14 --data-dir IMAGES --compression 0.5 --output runs/vitb14
    python tools/compress.py --model dinov2_vitb14 --data-dir IMAGES --speedup 1.5 --output runs/fast
    python tools/compress.py --model dinov2s_derived --rank-ratio 0.25 --output runs/demo      (weights and images embedded)
    python tools/compress.py --model smollm2 --data-dir text.txt --compression 0.5 --output runs/smollm2

vitoats.load, tools/eval_imagenet.py and tools/export_onnx.py open the folder; with --format dense, timm opens it as local-dir:.
"""

import time
from argparse import Namespace
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitoats.cli import common, config_file, flags, record, report_page
from vitoats.cli.method_flags import add_method_flags, settings
from vitoats.common.errors import InputError
from vitoats.common.files import hold, remove_beside

if TYPE_CHECKING:
    from vitoats.compression.job import CompressionJob
    from vitoats.compression.run import Compressed
    from vitoats.compression.structural import PruningReport


def main(argv: list[str]) -> dict[str, Any]:
    """Parses flags, compresses, writes the folder, prints the table of layers; returns the JSON line."""
    return record.recorded("compress", config_file.parse(make_parser(), argv), argv, execute)


def execute(args: Namespace) -> dict[str, Any]:
    """Compresses, writes the folder and the page of --report; returns the JSON line."""
    from vitoats.common.outputs import check_parents

    check_parents(args.output)
    report_page.check(args.report)
    if args.dry_run and args.report:
        raise InputError("a dry run has no result to report: leave --report out, or --dry-run")
    if args.dry_run:
        return preview(args)
    from vitoats.common import ranks

    # while the folder is held, the leftovers of a killed run are cleaned up
    with ranks.joined(args.device), hold(args.output) if ranks.is_first() else nullcontext():
        result, first = run(args), ranks.is_first()
    if first:
        data = (args.data_dir or [None])[0]
        report_page.after(args, [args.output], dense=common.source(args), data=data)
    return result


def preview(args: Namespace) -> dict[str, Any]:
    """Says what the compression would cover and take; returns the JSON line."""
    from vitoats.compression.run import preview

    job = make_job(args)
    expected = preview(job, scratch=args.output.parent)
    for line in [] if args.quiet else expected.lines():
        print(line)
    return {"model": job.model.name, "method": job.method, "dry_run": True, **expected.to_dict()}


def run(args: Namespace) -> dict[str, Any]:
    """Compresses, writes the locked folder, and prints the tables; returns the JSON line."""
    from vitoats.common import ranks
    from vitoats.common.memory import peak_memory
    from vitoats.common.outputs import check_output_folder
    from vitoats.compression.run import run as run_job

    start = time.perf_counter()
    kept = args.output.with_name(args.output.name + ".partial")
    overwrite = args.overwrite or is_complete(args, kept)
    check_output_folder(args.output, overwrite)
    job = make_job(args)
    with common.Bars(args.quiet) as progress:
        compressed = run_job(job, scratch=args.output.parent, partial_folder=kept, resume=args.resume, progress=progress)
    compressed.save(args.output, args.format, overwrite)
    ranks.wait_for_all()
    if not ranks.is_first():
        return {}
    remove_beside(args.output, kept)
    common.log.info("memory: %.2f GB at most", peak_memory() / 1e9)
    if not args.quiet:
        print_figures(compressed, args.output)
    return json_line(job, compressed, args.output, args.format, time.perf_counter() - start)


def is_complete(args: Namespace, kept: Path) -> bool:
    """Whether the run to resume has already written its folder, and was only interrupted before it removed its saved blocks."""
    if not (args.resume and kept.is_dir() and args.output.is_dir()):
        return False
    from vitoats.compression.resume import is_output_of

    complete = is_output_of(kept, args.output, args.format)
    if complete:
        common.log.info("%s is finished already: it is written once more from its blocks", args.output)
    return complete


def make_job(args: Namespace) -> "CompressionJob":
    """The compression that the flags describe.

    Raises:
        InputError: the flags contradict each other.
    """
    from vitoats.compression.settings import make_job
    from vitoats.loading.language_models import is_language_model
    from vitoats.methods.registry import StructuralMethod, find_method

    structural = isinstance(find_method(args.method), StructuralMethod)
    if structural and args.format != "factored" and not is_language_model(args.model):
        raise InputError(f"{args.method} writes smaller dense matrices, which timm does not open: leave --format out")
    job = make_job(args.model, args.data_dir, **settings(args))
    if job.limit and args.format == "dense":
        raise InputError(
            f"`{job.limit.kind}` is out of place, --format dense writes weights as large and as slow as before: "
            "leave one of them out"
        )
    return job


def print_figures(compressed: "Compressed", output: Path) -> None:
    """Prints the tables of layers and counts on stdout."""
    from vitoats.compression.structural import PruningReport
    from vitoats.loading.checkpoint import about as saved
    from vitoats.models.flops import FLOPS, FLOPS_OF_TEXT
    from vitoats.models.inputs import TextInputs
    from vitoats.report.tables import count_table, layer_table, pruning_table, skipped_lines

    report, about = compressed.report, saved(output)
    if isinstance(report, PruningReport):
        pruning_table(report)
    else:
        layer_table(report)
    for line in skipped_lines(report):
        print(line)
    count_table(about["counts_before"], about["counts"])
    counted = FLOPS_OF_TEXT if isinstance(compressed.loaded.inputs, TextInputs) else FLOPS
    print(f"GFLOPs: {about['flops_before'] / 1e9:.4f} before, {about['flops'] / 1e9:.4f} after ({counted})")


def json_line(job: "CompressionJob", compressed: "Compressed", output: Path, format: str, seconds: float) -> dict[str, Any]:
    """The JSON line that the command prints last."""
    from vitoats.compression.structural import PruningReport
    from vitoats.loading.checkpoint import WEIGHTS
    from vitoats.loading.checkpoint import about as saved

    report, about = compressed.report, saved(output)
    return {
        "model": job.model.name,
        "method": job.method,
        "compression": round(report.compression, 6),
        "rank_ratio": about["config"].get("rank_ratio"),
        "pattern": about["config"].get("pattern"),
        "format": format,
        "weights": job.weights,
        **(_units(report) if isinstance(report, PruningReport) else {"n_layers": len(report.layers)}),
        "param_count_before": round(about["counts_before"]["parameters"] / 1e6, 3),
        "param_count": round(about["counts"]["parameters"] / 1e6, 3),
        "gflops_before": round(about["flops_before"] / 1e9, 4),
        "gflops": round(about["flops"] / 1e9, 4),
        "feature_error": {name: round(error, 6) for name, error in about["feature_error"].items()},
        **about["predicted"],
        "n_images": report.n_images,
        "model_mb": round(sum(file.stat().st_size for file in output.glob(WEIGHTS.replace(".", "*."))) / 1e6, 3),
        "seconds": round(seconds, 1),
        "output": str(output),
    }


def _units(report: "PruningReport") -> dict[str, Any]:
    """Numbers of heads, key-value groups and neurons before and after pruning, for the JSON line."""
    units: dict[str, Any] = {}
    for kind in ("heads", "groups", "neurons"):
        rows = [row for row in report.modules if row.kind == kind]
        if kind == "groups" and not rows:
            continue
        units |= {kind: sum(row.kept for row in rows), f"{kind}_before": sum(row.before for row in rows)}
    return units


def make_parser() -> flags.ArgumentParser:
    """The flags of compress."""
    parser = flags.parser("compress", __doc__)
    flags.add_model_flags(parser)
    flags.add_data_flags(parser, batch_size=None)
    flags.add_compute_flags(parser)
    parser.add_argument("--config", type=Path, metavar="FILE", help="a YAML recipe; a flag beats it")
    parser.add_argument("--output", "-o", type=Path, required=True, metavar="DIR", help="the folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder if compress wrote it")
    flags.add_report(parser)
    parser.add_argument("--dry-run", action="store_true", help="say what it covers and takes (layers, memory, time), and stop")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run of the same command")
    parser.add_argument(
        "--format",
        choices=("factored", "dense"),
        default="factored",
        help="dense folds S + UV; timm or transformers opens it",
    )
    add_method_flags(parser)
    parser.add_argument(
        "--memory-limit",
        type=flags.positive_number,
        metavar="GB",
        help="above it, hidden states go to a mapped file beside --output",
    )
    return parser
