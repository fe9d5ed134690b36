"""Flags that several commands share, and types for the values of flags."""

import argparse
import ast
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vitoats import __version__
from vitoats.common import sizes
from vitoats.common.errors import InputError
from vitoats.common.sizes import ImageSize

INTERPOLATIONS = ("bicubic", "bilinear", "lanczos", "hamming", "box", "nearest")  # Pillow's, by timm's names


class ArgumentParser(argparse.ArgumentParser):
    """An argparse parser that raises usage errors as InputError, on one line like all other errors."""

    def error(self, message: str):
        raise InputError(f"{message} (see {self.prog} --help)")


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of examples, and adds the defaults that say something.

    Those are not the defaults of switches, of required flags, and of flags that are None or empty.
    """

    def _get_help_string(self, action: argparse.Action) -> str | None:
        says = not action.required and action.default not in (None, False, "", [], argparse.SUPPRESS)
        if not (says and action.option_strings and action.nargs != 0):
            return action.help
        typed = " ".join(map(str, action.default)) if isinstance(action.default, tuple) else "%(default)s"
        return f"{action.help} (default: {typed})"


def parser(command: str, about: str | None) -> ArgumentParser:
    """Creates a parser with the flags that every command has.

    Args:
        command: the name of the command.
        about: the docstring of its module: the first line begins the help, and the rest, with its examples, ends it.
    """
    first, _, rest = (about or "").partition("\n")
    epilog = re.sub(r"python tools/(\w+)\.py", r"vitoats \1", rest.strip("\n"))
    parser = ArgumentParser(prog=command, description=first, epilog=epilog, formatter_class=HelpFormatter)
    parser.add_argument("--version", action="version", version=f"vitoats {__version__}", help="print the version, and stop")
    made = parser.add_argument_group("output")
    made.add_argument("--quiet", action="store_true", help="no progress, no tables: warnings, errors and the JSON line only")
    made.add_argument("--results-file", type=Path, metavar="FILE", help="also write the JSON line to this file")
    made.add_argument("--results-format", choices=("csv", "json"), help="of that file; by its ending where not given")
    return parser


def add_model_flags(made: argparse._ActionsContainer, required: bool = True) -> None:
    """Adds --model, which may be ``required``, and the other flags that select and configure the model."""
    made = made.add_argument_group("model")
    made.add_argument(
        "--model",
        "-m",
        required=required,
        metavar="NAME",
        help="dinov2_vitb14 (or vits14, vitl14, vitg14, each also with _reg), a timm name, hf-hub:owner/name, "
        "local-dir:/path, a folder that compress wrote, dinov3_vits16 or dinov2s_derived; "
        "compress also takes language models: smollm2, hf-hub:owner/name, local-dir:/path, of transformers",
    )
    made.add_argument("--checkpoint", type=Path, metavar="FILE", help="a .pth or .safetensors file with the weights")
    made.add_argument("--random-weights", action="store_true", help="random weights, for a dry run; nothing is fetched")
    add_img_size(made)
    made.add_argument(
        "--crop-mode", choices=("center", "squash", "border"), help="squash resizes both sides, as the OATS paper does"
    )
    made.add_argument(
        "--pos-resample",
        choices=("official", "hf", "timm"),
        help="how the position embedding is resized: official is Meta's and the default for dinov2_ names, timm for others",
    )
    made.add_argument(
        "--head",
        type=Path,
        metavar="FILE",
        help="a linear head for a backbone without one (.safetensors or .pth)",
    )
    made.add_argument(
        "--head-layers", type=positive, metavar="N", help="how many layers the head takes, where its file does not say"
    )
    made.add_argument("--head-name", metavar="NAME", help="which of the heads in the file, by its name or a part of it")
    made.add_argument(
        "--model-kwargs",
        type=keyword,
        nargs="+",
        metavar="NAME=VALUE",
        help="arguments of timm's architecture: global_pool=avg init_values=1e-5 reg_tokens=4",
    )
    made.add_argument("--mean", type=float, nargs="+", metavar="X", help="per channel, of pixels in 0..1")
    made.add_argument("--std", type=positive_number, nargs="+", metavar="X", help="per channel")
    made.add_argument("--interpolation", choices=INTERPOLATIONS, help="of the resize")
    made.add_argument(
        "--crop-pct",
        type=positive_number,
        metavar="X",
        help="share of the resized image that is cropped",
    )


def add_img_size(made: argparse._ActionsContainer, when: str = "") -> None:
    """Adds --img-size; ``when`` goes before its help."""
    words = f"{when}image size, or HxW; the model's usual one by default"
    made.add_argument("--img-size", type=image_size, metavar="PX", help=words)


def add_no_amx(made: argparse.ArgumentParser) -> None:
    """Adds --no-amx, for ``vitoats.common.amx.refuse_amx``."""
    made.add_argument("--no-amx", action="store_true", help="keep AMX from all runtimes, as on a processor without it")


def add_data_flags(made: argparse._ActionsContainer, batch_size: int | None, workers: int = 0) -> None:
    """Adds --data-dir and the flags that control how images are read.

    If ``batch_size`` is None, the flag is left out of the namespace where it is not given, and --data-dir also takes texts.
    """
    images = "images: one folder for each class, a flat folder, or 'sample' (28 px clothes)"
    text = "; for a language model: .txt, .jsonl or .parquet files or folders, used in equal shares, or 'sample'"
    made = made.add_argument_group("images")
    made.add_argument(
        "--data-dir",
        "--data-path",
        metavar="DIR",
        nargs=None if batch_size else "+",
        help=images if batch_size else images + text,
    )
    default, said = (batch_size, "") if batch_size else (argparse.SUPPRESS, " (default: 64; 4 windows of text)")
    made.add_argument("-b", "--batch-size", type=positive, default=default, metavar="N", help=f"images at a time{said}")
    made.add_argument(
        "-j", "--workers", "--num-workers", type=non_negative, default=workers, metavar="N", help="processes that read images"
    )


def add_report(made: argparse._ActionsContainer) -> None:
    """Adds --report, for ``vitoats.cli.report.after``."""
    made.add_argument("--report", type=Path, metavar="FILE", help="also write an HTML page about the result (docs/report.md)")


def add_compute_flags(
    made: argparse._ActionsContainer, seed_of: str = "of the calibration sample and the solver", device: bool = True
) -> None:
    """Adds --threads, --seed, with the help ``seed_of``, and --device where a command runs on other devices, too."""
    made = made.add_argument_group("resources")
    if device:
        made.add_argument("--device", default="cpu", help="cpu, or cuda")
    made.add_argument("--threads", type=non_negative, default=0, metavar="N", help="CPU threads; 0 takes all cores")
    made.add_argument("--seed", type=seed, default=42, help=seed_of)


def _number(text: str, kind: type, good: Callable[[Any], bool], words: str):
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not good(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not {words}")
    return value


def keyword(text: str) -> tuple[str, Any]:
    """Parses NAME=VALUE as timm does, for argparse: the value is a Python literal, or else text."""
    name, given, value = text.partition("=")
    if not given or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=VALUE")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return name, value


def positive(text: str) -> int:
    """Parses an integer of at least 1, for argparse."""
    return _number(text, int, lambda n: n >= 1, "a whole number of 1 or more")


def image_size(text: str) -> ImageSize:
    """Parses an image size, PX or HEIGHTxWIDTH, for argparse."""
    if not re.fullmatch(r"\d{1,6}(x\d{1,6})?", text) or not all(found := [int(side) for side in text.split("x")]):
        raise argparse.ArgumentTypeError(f"{text!r} is not an image size, such as 224, or 224x320 for a height of 224")
    return sizes.image_size(found[0], found[-1])


def non_negative(text: str) -> int:
    """Parses an integer of at least 0, for argparse."""
    return _number(text, int, lambda n: n >= 0, "a whole number of 0 or more")


def seed(text: str) -> int:
    """Parses a seed that torch accepts, for argparse."""
    return _number(text, int, lambda n: 0 <= n < 2**63, "a whole number from 0 to 2^63 - 1")


def positive_number(text: str) -> float:
    """Parses a finite number above 0, for argparse."""
    return _number(text, float, lambda x: 0 < x < float("inf"), "a number above 0")


def percentage(text: str) -> float:
    """Parses a percentage from 0 to below 100, for argparse."""
    return _number(text, float, lambda x: 0 <= x < 100, "a percentage from 0 to below 100")
