"""Accuracy against milliseconds and bytes of exported files: dense, int8, and methods in float32 and int8, in one run.

    python tools/front.py --output runs/front
    python tools/front.py --model dinov2s_derived --data-dir /usr/share/datasets/fashion-mnist --num-samples 4000 --threads 1 \
        --methods oats-h,numerical --compressions 0.4,0.5,0.6,0.7 --output runs/front

Everything is measured on the files as they would be deployed, and they take turns. The folder keeps the files: repeating an
interrupted command makes only the missing ones, and measures all. docs/compare.md has more.
"""

from argparse import Namespace
from pathlib import Path
from typing import Any

from vitoats.cli import common, config_file, flags, record
from vitoats.cli.compare import compressions, methods, read_options, settings_of, shared_settings
from vitoats.common.errors import InputError


def main(argv: list[str]) -> dict[str, Any]:
    """Parses flags, makes the missing files, measures all; returns the JSON line."""
    return record.recorded("front", config_file.parse(make_parser(), argv), argv, execute)


def execute(args: Namespace) -> dict[str, Any]:
    """Makes the missing files, measures all; returns the JSON line."""
    from vitoats.common.outputs import check_folder

    check_folder(args.output)
    front = make_front(args)

    from vitoats.comparison.front import measure_front
    from vitoats.report.front import markdown

    with common.Bars(args.quiet) as progress:
        result = measure_front(front, progress)
    if not args.quiet:
        print(markdown(result["rows"]))
    return result


def make_front(args: Namespace) -> Any:
    """The front that the flags describe: each method in float32 and in int8.

    Raises:
        InputError: the flags contradict each other.
    """
    from vitoats.comparison.front import Front
    from vitoats.comparison.plan import OWN, plan

    shared = shared_settings(args)
    options = read_options(args)
    settings: dict[str, dict[str, Any]] = {}
    for label, method in args.methods.items():
        if label == "native" or label.endswith("-int8"):
            raise InputError(f"--methods {label}: the front names a row like this itself: write another LABEL={method}")
        own = settings_of(args, label, method, options.get(label, {}))
        settings |= {label: own, f"{label}-int8": own | {"weights": "int8"}}
    runs, _ = plan(shared, settings, [OWN], args.compressions)
    return Front(runs=runs, output=args.output, num_samples=args.num_samples, batch=args.batch)


def make_parser() -> flags.ArgumentParser:
    """The flags of front."""
    parser = flags.parser("front", __doc__)
    flags.add_model_flags(parser)
    flags.add_data_flags(parser, batch_size=64)
    flags.add_compute_flags(parser)
    parser.set_defaults(model="dinov2s_derived")
    next(action for action in parser._actions if action.dest == "model").required = False
    parser.add_argument(
        "--methods",
        type=methods,
        default="oats-h,numerical",
        metavar="A,B,...",
        help="METHOD or LABEL=METHOD, each as compress takes it; each in float32 and in int8",
    )
    parser.add_argument(
        "--compressions", type=compressions, default="0.4,0.5,0.6,0.7", metavar="RHO,...", help="shares of weights to remove"
    )
    parser.add_argument(
        "--options", action="append", metavar="METHOD:NAME=VALUE,...", help="settings of one method; may be given again"
    )
    parser.add_argument("--nsamples", type=flags.positive, default=512, metavar="N", help="calibration images, of train")
    parser.add_argument(
        "--num-samples", type=flags.positive, metavar="N", help="test images, the first of a seeded shuffle; all by default"
    )
    parser.add_argument("--batch", type=flags.positive, default=1, metavar="N", help="images at a time when files are timed; 1")
    parser.add_argument("--output", "-o", type=Path, required=True, metavar="DIR", help="the folder to write, or to go on with")
    return parser
