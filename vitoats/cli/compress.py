"""Compresses a vision transformer with calibration images and writes a folder.

    python tools/compress.py --model dinov2_vitb14 --data-dir IMAGES --compression 0.5 --output runs/vitb14
    python tools/compress.py --model dinov2s_derived --rank-ratio 0.25 --output runs/demo      (weights and images embedded)

The folder opens with vitoats.load, tools/eval_imagenet.py and tools/export_onnx.py; with --format dense in timm as local-dir:.
"""

import dataclasses
import logging
import shutil
import time
from argparse import SUPPRESS, BooleanOptionalAction, Namespace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitoats.cli import common
from vitoats.errors import InputError

if TYPE_CHECKING:
    from vitoats.data.calibration import CalibrationImages
    from vitoats.methods.registry import Method, Recipe
    from vitoats.models.loading import LoadedModel
    from vitoats.pipeline import CompressionReport

log = logging.getLogger("vitoats")
HELD_OUT = 32  # images of each kind that do not calibrate, to measure features on
ALLOCATION_IMAGES = 96  # of the calibration images, that budgets are split with
DOMAIN_RATIO = 3  # features on other images may be off this many times as much before it is worth a warning
RECIPE_FLAGS = ("target", "refit_bias", "allocation", "calibration_mix")
METHOD_FLAGS = ("compression", "rank_ratio", "iterations", "pattern", "solver", "tolerance")


def main(argv: list[str]) -> dict[str, Any]:
    """Parses flags, compresses, writes the folder, prints the table of layers; returns the JSON line."""
    args = common.parse(make_parser(), argv)
    result, report = run(args)
    if not args.quiet:
        from vitoats.report.tables import layer_table, skipped_lines

        layer_table(report)
        for line in skipped_lines(report):
            print(line)
    return result


def run(args: Namespace) -> tuple[dict[str, Any], "CompressionReport"]:
    """Compresses and writes the folder; returns the JSON line and the figures of all layers."""
    common.check_output_folder(args.output, args.overwrite)

    from vitoats.checkpoint import WEIGHTS, save_checkpoint

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
        "n_layers": len(report.layers),
        "n_images": report.n_images,
        "model_mb": round((args.output / WEIGHTS).stat().st_size / 1e6, 3),
        "seconds": round(time.perf_counter() - start, 1),
        "output": str(args.output),
    }
    return result, report


def compress_model(args: Namespace, partial: Path | None = None) -> tuple["LoadedModel", dict[str, Any], "CompressionReport"]:
    """From flags to a compressed model.

    Args:
        args: the flags of compress.
        partial: where finished blocks are kept, for ``--resume``; nowhere if None.

    Returns:
        the model, what vitoats.json says of it, and the figures of all layers.
    """
    import vitoats.methods  # noqa: F401  (fills the table of methods)
    from vitoats.data.calibration import calibration_images
    from vitoats.data.images import SAMPLE
    from vitoats.evaluate.fidelity import Fidelity
    from vitoats.methods.registry import get_method
    from vitoats.models.names import EMBEDDED
    from vitoats.pipeline import compress
    from vitoats.resume import BlockStore, fingerprint

    method = get_method(args.method)
    recipe = make_recipe(args, method)
    config = make_config(args, method)
    if args.data_dir is None:
        if args.model != EMBEDDED:
            raise InputError("there are no images to calibrate on: give --data-dir a folder of images")
        args.data_dir = SAMPLE
    common.set_threads(args.threads)
    device = common.check_device(args.device)
    loaded = common.load(args)
    model, img_size = loaded.timm_model.to(device), loaded.preprocessing.img_size
    images = calibration_images(
        args.data_dir,
        args.general_images,
        recipe.calibration_mix,
        args.nsamples,
        HELD_OUT,
        args.seed,
        img_size,
        loaded.preprocessing.transform(),
    )

    settings = {
        "model": args.model,
        "method": args.method,
        "method_digest": method.digest,
        "config": dataclasses.asdict(config),
        "recipe": dataclasses.asdict(recipe),
        "fused_qkv": args.fused_qkv,
        "preprocessing": loaded.preprocessing.to_dict(),
        "calibration": {
            "data": args.data_dir,
            "general_images": args.general_images,
            "nsamples": args.nsamples,
            "seed": args.seed,
            "images": {name: len(source) for name, source in images.sources.items()},
        },
    }
    identity = fingerprint(model, settings)
    store = None if partial is None else BlockStore(partial, identity, args.resume)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    fidelity = Fidelity(model, images.held_out, args.batch_size, args.workers)
    budgets = make_budgets(args, recipe, config, model, img_size, images)
    try:
        with common.Bar("block", args.quiet) as bar:
            report = compress(
                model,
                images.batches(args.batch_size, args.workers),
                method=args.method,
                config=config,
                img_size=img_size,
                nsamples=images.nsamples,
                batch_size=args.batch_size,
                fused_qkv=args.fused_qkv,
                target=recipe.target,
                refit_bias=recipe.refit_bias,
                budgets=budgets,
                memory_limit=None if args.memory_limit is None else args.memory_limit * 1e9,
                scratch=args.output.parent,
                state=store,
                progress=bar.update,
            )
    except BaseException:
        if store:
            store.settle()
        raise
    about = {**settings, "budgets": budgets, **report.to_dict(), "feature_error": fidelity.errors(model)}
    warn_of_other_domains(about["feature_error"])
    return loaded, about, report


def make_recipe(args: Namespace, method: "Method") -> "Recipe":
    """How the method is used on the whole model: flags that were given, then the method's own recipe."""
    given = {name: getattr(args, name) for name in RECIPE_FLAGS if name in args}
    if args.general_images and "calibration_mix" not in given:
        given["calibration_mix"] = "general"
    return dataclasses.replace(method.recipe, **given)


def make_budgets(
    args: Namespace, recipe: "Recipe", config: Any, model: Any, img_size: int, images: "CalibrationImages"
) -> dict[str, dict[str, float]] | None:
    """Budgets of single layers, None where all have the config's.

    Raises:
        InputError: the pattern or the method leaves no choice.
    """
    if recipe.allocation == "uniform":
        return None
    pattern = getattr(config, "pattern", None)
    if pattern is None or ":" in pattern:
        if "allocation" not in args:
            return None
        raise InputError(f"--allocation {recipe.allocation} needs a budget for each layer, which {pattern} fixes: leave it out")
    from vitoats.allocation.owl import outlier_shares, owl
    from vitoats.allocation.sensitivity import allocate, cached, measure
    from vitoats.calibration import HiddenStates
    from vitoats.methods.oats_h import OATSHConfig
    from vitoats.models.adapter import adapt
    from vitoats.resume import fingerprint

    adapter = adapt(model, img_size)
    few = dataclasses.replace(images, nsamples=min(images.nsamples, ALLOCATION_IMAGES))

    def hidden() -> HiddenStates:
        return HiddenStates.collect(adapter, few.batches(args.batch_size, args.workers), few.nsamples, args.batch_size)

    compression = config.total_compression()
    with common.Bar("allocation: block", args.quiet) as bar:
        n_blocks = len(adapter.linears)
        if recipe.allocation == "owl":
            shares = outlier_shares(adapter, hidden(), progress=lambda i: bar.update(i, n_blocks, "outliers"))
            return owl(adapter, shares, compression)
        measured_with = OATSHConfig(rank_ratio=getattr(config, "rank_ratio", 0.0), pattern=pattern)
        settings = {
            "data": [args.data_dir, args.general_images, recipe.calibration_mix, few.nsamples, args.seed],
            "config": dataclasses.asdict(measured_with),
            "img_size": img_size,
        }
        sensitivities = cached(
            fingerprint(model, settings),
            lambda: measure(adapter, hidden(), measured_with, lambda i, what: bar.update(i, n_blocks, what)),
        )
    return allocate(sensitivities, compression)


def warn_of_other_domains(errors: dict[str, float]) -> None:
    """Says how far features moved on images that did not calibrate, and warns if those unlike the user's fare much worse."""
    log.info("relative feature error on held-out images: %s", ", ".join(f"{k} {v:.3f}" for k, v in errors.items()))
    if errors.get("synthetic", 0) > DOMAIN_RATIO * errors.get("own", float("inf")):
        log.warning(
            "features of images unlike yours are off %.1f times as much as those of yours: "
            "if the model is to see such images, use --calibration-mix synthetic or --general-images DIR",
            errors["synthetic"] / errors["own"],
        )


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
    method(
        "--solver",
        help="oats: fast, or exact with full SVDs as published (default: fast); oats-h: admm, or support for OATS' support, "
        "which is cheaper (default: admm)",
    )
    method("--tolerance", type=float, help="oats: stop below this relative gain a step; 0 never stops early (default: 1e-4)")
    method(
        "--target",
        choices=("block", "sequential", "dense", "residual"),
        help="what a layer is to put out: what its dense weights make of the inputs it gets from compressed blocks (block), "
        "or from compressed layers too (sequential), what it puts out in the dense model (dense), or what makes up for the "
        "residual stream's losses as well (residual) (default: block; residual for oats-h)",
    )
    method(
        "--refit-bias",
        action=BooleanOptionalAction,
        help="let biases take up the mean of what is lost (default: no; yes for oats-h)",
    )
    method(
        "--allocation",
        choices=("uniform", "owl", "sensitivity"),
        help="how the budget is split over the layers: equally, by each block's outliers (OWL), or by what compressing each "
        "layer alone does to the features, measured and kept in the cache (default: uniform; sensitivity for oats-h)",
    )
    method(
        "--calibration-mix",
        choices=("none", "synthetic", "general", "both"),
        help="calibrate on as many synthetic images, or images of --general-images, as of your own, so that features also hold "
        "on images unlike yours (default: none; synthetic for oats-h)",
    )
    parser.add_argument("--general-images", metavar="DIR", help="varied images to calibrate on beside your own")
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
