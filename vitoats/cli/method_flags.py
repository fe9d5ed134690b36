"""The flags that choose a method and its settings, and what they come to together with the method's own defaults."""

import dataclasses
from argparse import SUPPRESS, ArgumentParser, BooleanOptionalAction, Namespace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitoats.cli.flags import positive, positive_number
from vitoats.cli.goals import refuse_goal
from vitoats.common.errors import InputError

if TYPE_CHECKING:
    from vitoats.methods.registry import Method, Recipe, StructuralMethod

METHOD_FLAGS = ("compression", "rank_ratio", "iterations", "pattern", "solver", "tolerance")
CLOSED_DOMAIN_DAMPING = 0.1  # where a method that mixes images is told not to (docs/oats-h.md, Images of other kinds)
RECIPE_FLAGS = ("target", "refit_bias", "allocation", "calibration_mix")
NSAMPLES = 512
PRESETS: dict[str, dict[str, dict[str, Any]]] = {  # by method and name: what flags are where they are not given
    "oats-h": {"fast": {"solver": "support", "iterations": 20, "allocation": "uniform", "nsamples": 128}},
}


def add_method_flags(parser: ArgumentParser) -> None:
    """--method and all settings of methods."""
    parser.add_argument(
        "--method",
        default="oats-h",
        help="oats-h, oats, wanda, magnitude, sparsegpt, mrp, alps, dsnot, dass, svd, numerical (heads and neurons), "
        "or ./file.py:name for your own; see docs/methods.md",
    )
    parser.add_argument(
        "--method-options", default="", metavar="NAME=VALUE,...", help="further settings of the method; see docs/methods.md"
    )
    # what a method is not told its preset or it itself decides, so these have no default here
    method = partial(parser.add_argument, default=SUPPRESS)
    parser.add_argument(
        "--preset",
        choices=("fast",),
        help="oats-h: fast finds supports as OATS does, splits the budget equally and calibrates on 128 images: minutes for "
        "a ViT-B; other flags beat it",
    )
    method("--nsamples", type=positive, metavar="N", help=f"calibration images, drawn at random (default: {NSAMPLES})")
    budget = parser.add_mutually_exclusive_group()
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
    parser.add_argument(
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
        help="oats-h, oats: share of the kept weights for the low-rank term (default: 0.25, oats 0.2)",
    )
    method(
        "--iterations",
        type=int,
        metavar="N",
        help="iterations at most (default: oats-h 150, oats 80, alps 300, dsnot 50, numerical 0)",
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


def given_flags(args: Namespace) -> dict[str, Any]:
    """Method flags that were given, and what the preset says of the others.

    Raises:
        InputError: the method has no such preset.
    """
    if args.preset and args.preset not in PRESETS.get(args.method, {}):
        raise InputError(f"the method {args.method} has no preset {args.preset!r}: leave --preset out, or use --method oats-h")
    preset = PRESETS[args.method][args.preset] if args.preset else {}
    return preset | {name: getattr(args, name) for name in ("nsamples", *METHOD_FLAGS, *RECIPE_FLAGS) if name in args}


def make_recipe(args: Namespace, method: "Method | StructuralMethod") -> "Recipe":
    """How the method is used on the whole model: flags that were given, then the preset, then the method's own recipe."""
    given = {name: value for name, value in given_flags(args).items() if name in RECIPE_FLAGS}
    if args.general_images and "calibration_mix" not in given:
        given["calibration_mix"] = "general"
    return dataclasses.replace(method.recipe, **given)


def refuse_layer_flags(args: Namespace) -> None:
    """Refuses what only methods that work layer by layer take.

    Raises:
        InputError: one of these flags is given.
    """
    for name in ("target", "refit_bias", "allocation"):
        if name in args:
            raise InputError(f"{args.method} compresses no single layers: leave --{name.replace('_', '-')} out")
    refuse_goal(args, f"{args.method} removes heads and neurons: give --compression instead")
    if args.resume:
        raise InputError(f"{args.method} starts anew each time, for it keeps no finished blocks: leave --resume out")
    if args.fused_qkv:
        raise InputError(f"{args.method} removes whole heads from q, k and v: leave --fused-qkv out")
    if args.format != "factored":
        raise InputError(f"{args.method} writes smaller dense matrices, which timm does not open: leave --format out")


def make_config(args: Namespace, method: "Method | StructuralMethod") -> Any:
    """The method's config: flags, --method-options, what the preset says, what suits the mix, and then the method's defaults.

    Raises:
        InputError: the method has no such setting, or its value is wrong.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(method.config)}
    given = {name: value for name, value in given_flags(args).items() if name in METHOD_FLAGS}
    for name in given.keys() - defaults.keys():
        raise InputError(f"the method {args.method} takes no --{name.replace('_', '-')}: leave it out")
    closed_domain = method.recipe.calibration_mix != "none" and make_recipe(args, method).calibration_mix == "none"
    if closed_domain and "damping" in defaults:
        given["damping"] = CLOSED_DOMAIN_DAMPING
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
