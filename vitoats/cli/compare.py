"""Compares compression methods: same calibration images, same test images, same budgets, one row per run.

    python tools/compare.py --model dinov2s_derived --methods magnitude,wanda,sparsegpt,oats --compressions 0.4,0.5,0.6 \
        --data-dir /usr/share/datasets/fashion-mnist --options oats:rank_ratio=0.25 --output runs/compare
    python tools/compare.py --model dinov2s_derived --methods wanda,oats --patterns 2:4 --nsamples 64 --output runs/small

Run the same command again to continue an interrupted comparison. docs/compare.md explains the columns.
"""

from argparse import ArgumentTypeError, Namespace
from pathlib import Path
from typing import Any

from vitoats.cli import common, config_file, flags, record, report_page
from vitoats.cli import compress as compress_command
from vitoats.cli.method_flags import SHARED, settings
from vitoats.common.errors import InputError

# flags of compress that --options cannot set: the comparison sets them itself, or they make no sense for a single row
SET_HERE = ("method", "method_options", "compression", "pattern", "config", "output", "overwrite", "resume", "format")


def main(argv: list[str]) -> dict[str, Any]:
    """Parses flags, runs the missing rows, writes and prints the results; returns the JSON line."""
    return record.recorded("compare", config_file.parse(make_parser(), argv), argv, execute)


def execute(args: Namespace) -> dict[str, Any]:
    """Runs the missing rows, writes and prints the results; returns the JSON line."""
    from vitoats.common.outputs import check_folder

    check_folder(args.output)
    report_page.check(args.report)
    comparison = make_comparison(args)
    for line in comparison.skipped:
        common.log.warning("%s", line)

    from vitoats.comparison.compare import compare
    from vitoats.report.comparison import comparison_table

    with common.Bars(args.quiet) as progress:
        result = compare(comparison, progress)
    if not args.quiet:
        title = f"{args.model}, {result['n_images']} test images"
        comparison_table(f"{title}; MB are those of the weights on disk; ± is one standard error", result["rows"])
    report_page.after(args, [args.output])
    return result


def shared_settings(args: Namespace) -> dict[str, Any]:
    """The settings that all methods have in common.

    Raises:
        InputError: there are no images.
    """
    if args.data_dir is None and args.model != "dinov2s_derived":
        raise InputError("there are no images: give --data-dir a folder with train and val, each one folder a class")
    shared = common.model_settings(args) | {name: getattr(args, name) for name in SHARED if name in args}
    shared |= {"model": args.model, "images": args.data_dir, "nsamples": args.nsamples}
    return shared


def make_comparison(args: Namespace) -> Any:
    """The comparison that the flags describe.

    Raises:
        InputError: the flags contradict each other.
    """
    from vitoats.comparison.compare import Comparison
    from vitoats.comparison.plan import plan

    shared = shared_settings(args)
    options = read_options(args)
    methods = {label: settings_of(args, label, method, options.get(label, {})) for label, method in args.methods.items()}
    runs, skipped = plan(shared, methods, args.patterns, args.compressions)
    return Comparison(
        runs=runs,
        output=args.output,
        num_samples=args.num_samples,
        ood_dir=args.ood_dir,
        keep_models=args.keep_models,
        skipped=skipped,
    )


def read_options(args: Namespace) -> dict[str, dict[str, str]]:
    """Parses --options LABEL:NAME=VALUE,... to the names and values for each label.

    Raises:
        InputError: a label is not one of --methods, or a value is missing.
    """
    options: dict[str, dict[str, str]] = {}
    for text in args.options or []:
        label = text.partition("=")[0].rpartition(":")[0]
        if label not in args.methods:
            raise InputError(
                f"--options {text} names no method of --methods: "
                f"write METHOD:NAME=VALUE,... with one of {', '.join(args.methods)}"
            )
        for item in text.removeprefix(label + ":").split(","):
            name, equals, value = item.partition("=")
            if not equals or not name:
                raise InputError(f"--options {text}: {item!r} is no NAME=VALUE")
            options.setdefault(label, {})[name.replace("-", "_")] = value
    return options


def settings_of(args: Namespace, label: str, method: str, options: dict[str, str]) -> dict[str, Any]:
    """The settings of one method: its options, parsed like the flags of compress.

    Raises:
        InputError: an option cannot be set for a single method, or compress would refuse it.
    """
    parser = compress_command.make_parser()
    actions = {action.dest: action for action in parser._actions}
    words, rest = [f"--method={method}", "--model=", "--output="], []
    for name, value in options.items():
        action = actions.get(name)
        if name in SET_HERE or name in vars(args):
            raise InputError(f"--options {label}:{name}: this is no setting of one method: leave it out")
        if action is None:
            rest.append(f"{name}={value}")
        elif action.nargs != 0:
            words.append(f"--{name.replace('_', '-')}={value}")
        elif value == "true":
            words.append(f"--{name.replace('_', '-')}")
        else:
            raise InputError(f"--options {label}:{name} is true, or left out")
    if rest:
        words.append(f"--method-options={','.join(rest)}")
    try:
        given = settings(parser.parse_args(words))
    except InputError as error:
        raise InputError(f"{label}: {error} (settings of one method: --options {label}:NAME=VALUE,...)") from None
    return {name: value for name, value in given.items() if name not in vars(args)} | {"method": method}


def make_parser() -> flags.ArgumentParser:
    """The flags of compare."""
    parser = flags.parser("compare", __doc__)
    flags.add_model_flags(parser)
    flags.add_data_flags(parser, batch_size=64)
    flags.add_compute_flags(parser)
    parser.add_argument(
        "--methods", type=methods, required=True, metavar="A,B,...", help="METHOD or LABEL=METHOD, each as compress takes it"
    )
    parser.add_argument(
        "--compressions", type=compressions, default="0.5", metavar="RHO,...", help="shares of weights to remove"
    )
    parser.add_argument(
        "--patterns",
        type=patterns,
        default="own",
        metavar="P,...",
        help="own (each method's own default), row, layer, 1x4, 2:4",
    )
    parser.add_argument(
        "--options", action="append", metavar="METHOD:NAME=VALUE,...", help="settings of one method; may be given again"
    )
    parser.add_argument("--nsamples", type=flags.positive, default=512, metavar="N", help="calibration images, of train")
    parser.add_argument(
        "--num-samples", type=flags.positive, metavar="N", help="test images, the first of a seeded shuffle; all by default"
    )
    parser.add_argument("--ood-dir", type=Path, metavar="DIR", help="images of another kind: adds the ood columns")
    parser.add_argument("--keep-models", action="store_true", help="keep the compressed folders in DIR/models")
    parser.add_argument("--output", "-o", type=Path, required=True, metavar="DIR", help="the folder to write, or to go on with")
    flags.add_report(parser)
    return parser


def methods(text: str) -> dict[str, str]:
    """Parses "oats,mine=./file.py:name" to methods by label, for argparse."""
    found: dict[str, str] = {}
    for item in text.split(","):
        label, _, method = item.partition("=")
        if not label or label in ("dense", "int8"):
            raise ArgumentTypeError(f"{item!r} is no METHOD or LABEL=METHOD" + (": it is always a row" if label else ""))
        if label in found:
            raise ArgumentTypeError(f"{label!r} is named twice: write LABEL=METHOD for one of them")
        found[label] = method or label
    return found


def compressions(text: str) -> list[float]:
    """Parses "0.4,0.5", for argparse; the methods check the range."""
    try:
        return list(dict.fromkeys(float(item) for item in text.split(",")))
    except ValueError:
        raise ArgumentTypeError(f"{text!r} is no list of numbers such as 0.4,0.5") from None


def patterns(text: str) -> list[str]:
    """Parses "own,2:4", for argparse; the methods check the names."""
    return list(dict.fromkeys(text.split(",")))
