"""Compresses a vision transformer with calibration images and writes a folder.

    python tools/compress.py --model dinov2_vitb14 --data-dir IMAGES --compression 0.5 --output runs/vitb14
    python tools/compress.py --model dinov2_vitb14 --data-dir IMAGES --speedup 1.5 --output runs/fast
    python tools/compress.py --model dinov2s_derived --rank-ratio 0.25 --output runs/demo      (weights and images embedded)

The folder opens with vitoats.load, tools/eval_imagenet.py and tools/export_onnx.py; with --format dense in timm as local-dir:.
"""

import dataclasses
import logging
import shutil
import time
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitoats.cli import common, config_file, flags
from vitoats.cli.budgets import make_budgets
from vitoats.cli.goals import make_goal, say_prediction
from vitoats.cli.method_flags import NSAMPLES, add_method_flags, given_flags, make_config, make_recipe, refuse_layer_flags
from vitoats.common.errors import InputError
from vitoats.common.memory import reuse_freed_memory

if TYPE_CHECKING:
    from vitoats.compression.pipeline import CompressionReport
    from vitoats.compression.structural import PruningReport
    from vitoats.loading.load import LoadedModel

log = logging.getLogger("vitoats")
HELD_OUT = 32  # images of each kind that do not calibrate, to measure features on
DOMAIN_RATIO = 3  # features on other images may be off this many times as much before it is worth a warning


def main(argv: list[str]) -> dict[str, Any]:
    """Parses flags, compresses, writes the folder, prints the table of layers; returns the JSON line."""
    args = config_file.parse(make_parser(), argv)
    result, report = run(args)
    if not args.quiet:
        from vitoats.compression.structural import PruningReport
        from vitoats.loading.checkpoint import about
        from vitoats.models.flops import FLOPS
        from vitoats.report.tables import count_table, layer_table, pruning_table, skipped_lines

        if isinstance(report, PruningReport):
            pruning_table(report)
        else:
            layer_table(report)
        for line in skipped_lines(report):
            print(line)
        said = about(args.output)
        count_table(said["counts_before"], said["counts"])
        print(f"GFLOPs: {said['flops_before'] / 1e9:.4f} before, {said['flops'] / 1e9:.4f} after ({FLOPS})")
    return result


def run(args: Namespace) -> tuple[dict[str, Any], "CompressionReport | PruningReport"]:
    """Compresses and writes the folder; returns the JSON line and the figures of all layers."""
    common.check_output_folder(args.output, args.overwrite)

    from vitoats.compression.structural import PruningReport
    from vitoats.format.layers import parameter_count
    from vitoats.loading.checkpoint import WEIGHTS, save_checkpoint

    start = time.perf_counter()
    partial = args.output.with_name(args.output.name + ".partial")
    loaded, about, report = compress_model(args, partial)
    save_checkpoint(loaded, args.output, about, dense=args.format == "dense", overwrite=args.overwrite)
    shutil.rmtree(partial, ignore_errors=True)
    result = {
        "model": args.model,
        "method": args.method,
        "compression": round(report.compression, 6),
        "rank_ratio": about["config"].get("rank_ratio"),
        "pattern": about["config"].get("pattern"),
        "format": args.format,
        **(_units(report) if isinstance(report, PruningReport) else {"n_layers": len(report.layers)}),
        "param_count_before": round(about["counts_before"]["parameters"] / 1e6, 3),
        "param_count": round(parameter_count(loaded.timm_model) / 1e6, 3),
        "gflops_before": round(about["flops_before"] / 1e9, 4),
        "gflops": round(about["flops"] / 1e9, 4),
        **about.get("predicted", {}),
        "n_images": report.n_images,
        "model_mb": round((args.output / WEIGHTS).stat().st_size / 1e6, 3),
        "seconds": round(time.perf_counter() - start, 1),
        "output": str(args.output),
    }
    return result, report


def compress_model(
    args: Namespace, partial: Path | None = None
) -> tuple["LoadedModel", dict[str, Any], "CompressionReport | PruningReport"]:
    """From flags to a compressed model.

    Args:
        args: the flags of compress.
        partial: where finished blocks are kept, for ``--resume``; nowhere if None.

    Returns:
        the model, what vitoats.json says of it, and the figures of all layers.
    """
    import vitoats.methods  # noqa: F401  (fills the table of methods)
    from vitoats.compression.pipeline import compress
    from vitoats.compression.resume import BlockStore, fingerprint
    from vitoats.compression.structural import prune
    from vitoats.data.calibration import calibration_images
    from vitoats.data.images import SAMPLE
    from vitoats.evaluation.fidelity import Fidelity
    from vitoats.format.counts import count
    from vitoats.loading.names import EMBEDDED
    from vitoats.methods.registry import StructuralMethod, find_method
    from vitoats.models.flops import count_flops

    method = find_method(args.method)
    structural = isinstance(method, StructuralMethod)
    if structural:
        refuse_layer_flags(args)
    recipe = make_recipe(args, method)
    config = make_config(args, method)
    nsamples = given_flags(args).get("nsamples", NSAMPLES)
    if args.data_dir is None:
        if args.model != EMBEDDED:
            raise InputError("there are no images to calibrate on: give --data-dir a folder of images")
        args.data_dir = SAMPLE
    common.set_threads(args.threads)
    if args.memory_limit is None:
        reuse_freed_memory()
    device = common.check_device(args.device)
    loaded = common.load(args)
    model, inputs = loaded.timm_model.to(device), loaded.inputs
    images = calibration_images(
        args.data_dir,
        args.general_images,
        recipe.calibration_mix,
        nsamples,
        HELD_OUT,
        args.seed,
        inputs.img_size,
        loaded.preprocessing.transform(),
    )

    goal = None if isinstance(method, StructuralMethod) else make_goal(args, method, recipe, config, loaded)
    buffers = {name for name, _ in model.named_buffers()}
    before, flops_before = count(model.state_dict(), not_parameters=buffers), count_flops(model, inputs)
    settings = {
        "model": args.model,
        "method": args.method,
        "method_digest": method.digest,
        "config": dataclasses.asdict(config),
        "goal": None if goal is None else goal.to_dict(),
        "recipe": dataclasses.asdict(recipe),
        "fused_qkv": args.fused_qkv,
        "preprocessing": loaded.preprocessing.to_dict(),
        "calibration": {
            "data": args.data_dir,
            "general_images": args.general_images,
            "nsamples": nsamples,
            "seed": args.seed,
            "images": {name: len(source) for name, source in images.sources.items()},
        },
    }
    store = None
    if partial is not None and not structural:
        store = BlockStore(partial, fingerprint(model, settings), args.resume)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    work = {
        "method": args.method,
        "inputs": inputs,
        "nsamples": images.nsamples,
        "batch_size": args.batch_size,
        "memory_limit": None if args.memory_limit is None else args.memory_limit * 1e9,
        "scratch": args.output.parent,
    }
    stream = images.batches(args.batch_size, args.workers)
    report: CompressionReport | PruningReport
    try:
        fidelity = Fidelity(model, inputs, images.held_out, args.batch_size, args.workers)
        config, budgets = make_budgets(args, recipe, config, model, inputs, images, goal)
        predicted = {} if goal is None else say_prediction(goal, config, budgets)
        with common.Bar("block", args.quiet) as bar:
            if structural:
                report = prune(model, stream, config=config, **work, progress=bar.update)
            else:
                report = compress(
                    model,
                    stream,
                    config=config,
                    **work,
                    fused_qkv=args.fused_qkv,
                    target=recipe.target,
                    refit_bias=recipe.refit_bias,
                    budgets=budgets,
                    state=store,
                    progress=bar.update,
                )
    except BaseException:
        if store:
            store.settle()
        raise
    about = {
        "weights": loaded.weights,
        **settings,
        "config": dataclasses.asdict(config),
        "budgets": budgets,
        "predicted": predicted,
        **report.to_dict(),
        "counts_before": dataclasses.asdict(before),
        "flops_before": flops_before,
        "flops": count_flops(model, inputs),
        "feature_error": fidelity.errors(model),
    }
    warn_of_other_domains(about["feature_error"])
    return loaded, about, report


def warn_of_other_domains(errors: dict[str, float]) -> None:
    """Says how far features moved on images that did not calibrate, and warns if those unlike the user's fare much worse."""
    log.info("relative feature error on held-out images: %s", ", ".join(f"{k} {v:.3f}" for k, v in errors.items()))
    if errors.get("synthetic", 0) > DOMAIN_RATIO * errors.get("own", float("inf")):
        log.warning(
            "features of images unlike yours are off %.1f times as much as those of yours: "
            "if the model is to see such images, use --calibration-mix synthetic or --general-images DIR",
            errors["synthetic"] / errors["own"],
        )


def _units(report: "PruningReport") -> dict[str, Any]:
    """Heads and neurons for the JSON line, before and after."""
    units: dict[str, Any] = {}
    for kind in ("heads", "neurons"):
        rows = [row for row in report.modules if row.kind == kind]
        units |= {kind: sum(row.kept for row in rows), f"{kind}_before": sum(row.before for row in rows)}
    return units


def make_parser() -> flags.ArgumentParser:
    """The flags of compress."""
    parser = flags.parser("compress", (__doc__ or "").split("\n")[0])
    flags.add_model_flags(parser)
    flags.add_data_flags(parser, batch_size=64)
    flags.add_compute_flags(parser)
    parser.add_argument("--config", type=Path, metavar="FILE", help="a YAML recipe; a flag beats it")
    parser.add_argument("--output", "-o", type=Path, required=True, metavar="DIR", help="the folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder if compress wrote it")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run of the same command")
    parser.add_argument("--format", choices=("factored", "dense"), default="factored", help="dense folds S + UV; timm opens it")
    add_method_flags(parser)
    parser.add_argument(
        "--memory-limit",
        type=flags.positive_number,
        metavar="GB",
        help="above it, hidden states go to a mapped file beside --output",
    )
    return parser
