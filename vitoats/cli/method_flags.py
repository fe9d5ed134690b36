"""The flags that choose a method and its settings, and their conversion to settings."""

from argparse import SUPPRESS, ArgumentParser, BooleanOptionalAction, Namespace
from functools import partial
from pathlib import Path
from typing import Any

from vitoats.cli.common import model_settings
from vitoats.cli.flags import positive, positive_number

# Flags that are not given are absent from the namespace, so that the preset or the method decides; these are None instead.
ALWAYS = ("preset", "cost_table", "general_images")
SETTINGS = (
    *(
        "method",
        "nsamples",
        "compression",
        "speedup",
        "max_ms",
        "max_mb",
        "rank_ratio",
        "iterations",
        "pattern",
        "solver",
    ),
    *("tolerance", "target", "refit_bias", "allocation", "calibration_mix", "amp", "fused_qkv", "weights", "seq_len"),
)
SHARED = ("batch_size", "workers", "device", "threads", "seed", "memory_limit")  # by several commands


def add_method_flags(parser: ArgumentParser) -> None:
    """Adds --method and the flags for the settings of methods."""
    method_group = parser.add_argument_group("method", "how layers are compressed; docs/methods.md has all settings")
    amount_group = parser.add_argument_group("amount", "how much is removed; one of the first four")
    recipe_group = parser.add_argument_group("recipe", "how the method is used on a model; each has its own defaults")
    method_group.add_argument(
        "--method",
        default="oats-h",
        help="oats-h, oats, wanda, magnitude, sparsegpt, mrp, alps, dsnot, dass, svd, numerical (heads and neurons), "
        "or ./file.py:name for your own; see docs/methods.md",
    )
    method_group.add_argument(
        "--method-options", default="", metavar="NAME=VALUE,...", help="further settings of the method; see docs/methods.md"
    )
    # no defaults here: the preset or the method decides settings that are not given
    method = partial(method_group.add_argument, default=SUPPRESS)
    recipe = partial(recipe_group.add_argument, default=SUPPRESS)
    method_group.add_argument(
        "--preset",
        choices=("fast",),
        help="oats-h: fast finds supports as OATS does, splits the budget equally and calibrates on 128 images: minutes for "
        "a ViT-B; other flags beat it",
    )
    recipe(
        "--nsamples", type=positive, metavar="N", help="calibration images, drawn at random (default: 512; 128 windows of text)"
    )
    recipe(
        "--seq-len",
        type=positive,
        metavar="N",
        help="language models: tokens of a window (default: 2048, or the model's positions if these are fewer)",
    )
    budget = amount_group.add_mutually_exclusive_group()
    asked = partial(budget.add_argument, default=SUPPRESS)
    asked(
        "--compression", type=float, metavar="RHO", help="share of the weights to remove (default: 0.5 unless N:M implies it)"
    )
    asked(
        "--speedup",
        type=positive_number,
        metavar="X",
        help="remove what makes the exported model X times as fast as the dense one on this machine",
    )
    asked("--max-ms", type=positive_number, metavar="MS", help="remove what brings it to MS milliseconds")
    asked(
        "--max-mb", type=positive_number, metavar="MB", help="remove what brings the exported file to MB megabytes (10^6 bytes)"
    )
    amount_group.add_argument(
        "--cost-table",
        type=Path,
        metavar="FILE",
        help="with --speedup or --max-ms: what layers cost, from tools/benchmark.py op --model, of any machine and batch "
        "(default: measured here, with --threads and one image, and kept in the cache)",
    )
    method(
        "--rank-ratio",
        type=float,
        metavar="KAPPA",
        help="oats-h, oats: share of the kept weights that goes to the low-rank term (default: 0.25, oats 0.2)",
    )
    method(
        "--iterations",
        type=int,
        metavar="N",
        help="iterations at most (default: oats-h 300, oats 80, alps 300, dsnot 50, numerical 0)",
    )
    method(
        "--pattern",
        help="row, layer, blocks 1x2 or 1x4 along the input, or N:M such as 2:4, of which N are kept "
        "(default: row; layer for oats-h, magnitude, sparsegpt, mrp and alps)",
    )
    method(
        "--solver",
        help="oats: fast, or exact with full SVDs as published (default: fast); oats-h: admm, or support for OATS' support, "
        "which is cheaper (default: admm)",
    )
    method("--tolerance", type=float, help="oats: stop below this relative gain a step; 0 never stops early (default: 1e-4)")
    recipe(
        "--target",
        choices=("block", "sequential", "dense", "residual"),
        help="what a layer is to put out: what its dense weights make of the inputs it gets from compressed blocks (block), "
        "or from compressed layers too (sequential), what it puts out in the dense model (dense), or what makes up for the "
        "residual stream's losses as well (residual) (default: block; residual for oats-h)",
    )
    recipe(
        "--refit-bias",
        action=BooleanOptionalAction,
        help="let biases take up the mean of what is lost (default: no; yes for oats-h)",
    )
    recipe(
        "--allocation",
        choices=("uniform", "owl", "sensitivity"),
        help="how the budget is split over the layers: equally, by each block's outliers (OWL), or by what compressing each "
        "layer alone does to the features, measured and kept in the cache (default: uniform; sensitivity for oats-h)",
    )
    recipe(
        "--calibration-mix",
        choices=("none", "synthetic", "general", "both"),
        help="calibrate on half as many synthetic images, or images of --general-images, as of your own, so that features also "
        "hold on images unlike yours; both takes half as many of each (default: none; synthetic for oats-h)",
    )
    recipe_group.add_argument("--general-images", metavar="DIR", help="varied images to calibrate on beside your own")
    recipe(
        "--weights",
        choices=("float32", "int8"),
        help="of the compressed layers; with int8, these also round their inputs while the model runs (default: float32)",
    )
    recipe(
        "--amp",
        action="store_true",
        help="run the model under autocast to bfloat16 while calibrating, for processors and GPUs that have it; solvers stay "
        "in float32 and float64",
    )
    recipe_group.add_argument("--fused-qkv", action="store_true", help="decompose a fused qkv as one matrix, not as three")


def settings(args: Namespace) -> dict[str, Any]:
    """The keyword arguments for ``compression.settings.make_job``, from the flags that were given.

    Raises:
        InputError: the method does not exist or does not have such an option.
    """
    from vitoats.compression.settings import read_options

    given = model_settings(args) | {name: getattr(args, name) for name in (*SETTINGS, *SHARED) if name in args}
    given |= {name: getattr(args, name) for name in ALWAYS if getattr(args, name) is not None}
    return given | read_options(args.method, args.method_options)
