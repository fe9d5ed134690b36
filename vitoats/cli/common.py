"""What all commands share: flags, config files, errors and exit statuses, progress, and the JSON line at the end."""

import argparse
import difflib
import json
import logging
import os
import platform
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from vitoats.cli.results import write_results
from vitoats.errors import InputError, RunError

if TYPE_CHECKING:
    from vitoats.models.loading import LoadedModel

log = logging.getLogger("vitoats")
stderr = Console(stderr=True)


class ArgumentParser(argparse.ArgumentParser):
    """argparse whose usage errors are one line like all others."""

    def error(self, message: str):
        raise InputError(f"{message} (see {self.prog} --help)")


def parser(command: str, description: str) -> ArgumentParser:
    """A parser with the flags that every command has."""
    made = ArgumentParser(prog=command, description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    made.add_argument("--quiet", action="store_true", help="no progress, no tables: warnings, errors and the JSON line only")
    made.add_argument("--results-file", type=Path, metavar="FILE", help="also write the JSON line to this file")
    made.add_argument("--results-format", choices=("csv", "json"), help="of that file; by its ending where not given")
    return made


def add_model_flags(made: argparse.ArgumentParser) -> None:
    """--model and what goes with it."""
    made.add_argument(
        "--model",
        "-m",
        required=True,
        metavar="NAME",
        help="dinov2_vitb14 (or vits14, vitl14, vitg14, each also with _reg), a timm name, hf-hub:owner/name, "
        "local-dir:/path, a folder that compress wrote, or dinov2s_derived",
    )
    made.add_argument("--checkpoint", type=Path, metavar="FILE", help="a .pth or .safetensors file with the weights")
    made.add_argument("--random-weights", action="store_true", help="random weights, for a dry run; nothing is fetched")
    made.add_argument("--img-size", type=positive, metavar="PX", help="image size; the model's usual one by default")
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
        help="a linear head for a backbone without one (.safetensors or DINOv2's .pth)",
    )
    made.add_argument(
        "--head-layers", type=int, choices=(1, 4), help="how many layers the head takes, where its file does not say"
    )


def add_data_flags(made: argparse.ArgumentParser, batch_size: int, workers: int = 0) -> None:
    """--data-dir and how images are read."""
    made.add_argument(
        "--data-dir",
        "--data-path",
        metavar="DIR",
        help="images: one folder for each class, a flat folder, or 'sample' (28 px clothes)",
    )
    made.add_argument("-b", "--batch-size", type=positive, default=batch_size, metavar="N", help="images at a time")
    made.add_argument(
        "-j", "--workers", "--num-workers", type=non_negative, default=workers, metavar="N", help="processes that read images"
    )


def add_compute_flags(made: argparse.ArgumentParser) -> None:
    """--device, --threads and --seed."""
    made.add_argument("--device", default="cpu", help="cpu, or cuda")
    made.add_argument("--threads", type=non_negative, default=0, metavar="N", help="CPU threads; 0 takes all cores")
    made.add_argument("--seed", type=seed, default=42, help="of the calibration sample and the solver")


def load(args: argparse.Namespace, with_head: bool = True) -> "LoadedModel":
    """Loads the model that the model flags name, and says where its weights come from."""
    from vitoats.models.loading import load_model

    loaded = load_model(
        args.model,
        checkpoint=args.checkpoint,
        random_weights=args.random_weights,
        img_size=args.img_size,
        crop_mode=args.crop_mode,
        head=args.head,
        head_layers=args.head_layers,
        with_head=with_head,
        pos_resample=args.pos_resample,
    )
    log.info("model: %s (%s)", args.model, loaded.weights)
    log.info("preprocessing: %s", loaded.preprocessing)
    return loaded


def load_or_randomise(args: argparse.Namespace) -> tuple["LoadedModel", str]:
    """For benchmarks: the model with its own weights, or with random ones where those cannot be had; says which."""
    from vitoats.models.loading import load_model

    arguments = {"checkpoint": args.checkpoint, "img_size": args.img_size, "crop_mode": args.crop_mode}
    if not args.random_weights:
        try:
            loaded = load_model(args.model, **arguments)
            return loaded, loaded.weights
        except InputError as error:
            if "cannot be fetched" not in str(error):
                raise
            log.warning("%s", error)
    return load_model(args.model, random_weights=True, **arguments), "random weights"


def _number(text: str, kind: type, good: Callable[[Any], bool], words: str):
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not good(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not {words}")
    return value


def positive(text: str) -> int:
    """An int of at least 1, for argparse."""
    return _number(text, int, lambda n: n >= 1, "a whole number of 1 or more")


def non_negative(text: str) -> int:
    """An int of at least 0, for argparse."""
    return _number(text, int, lambda n: n >= 0, "a whole number of 0 or more")


def seed(text: str) -> int:
    """A seed that torch takes, for argparse."""
    return _number(text, int, lambda n: 0 <= n < 2**63, "a whole number from 0 to 2^63 - 1")


def positive_number(text: str) -> float:
    """A finite number above 0, for argparse."""
    return _number(text, float, lambda x: 0 < x < float("inf"), "a number above 0")


def percentage(text: str) -> float:
    """A percentage below 100, for argparse."""
    return _number(text, float, lambda x: 0 <= x < 100, "a percentage from 0 to below 100")


def parse(made: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """Parses flags; those not given come from ``--config FILE`` (YAML: flag names without dashes), then from the defaults.

    Raises:
        InputError: a flag or the file is wrong.
    """
    config = _first_look(argv, complain=True).config
    if config is not None and any(action.dest == "config" for action in made._actions):
        settings = _settings(config, made)
        for action in made._actions:
            if action.required and settings.get(action.dest) is not None:
                action.required = False
        given = made.parse_args(argv)
        for group in made._mutually_exclusive_groups:
            names = [action.dest for action in group._group_actions]
            set_here = [name for name in names if name in settings]
            if len(set_here) > 1:
                raise InputError(f"{config}: {' and '.join(set_here)} exclude each other: leave one of them out")
            if any(getattr(given, name, None) not in (None, made.get_default(name)) for name in names):  # a flag beats the file
                settings = {name: value for name, value in settings.items() if name not in names}
        made.set_defaults(**settings)
    return made.parse_args(argv)


def _first_look(argv: list[str], complain: bool) -> argparse.Namespace:
    """The flags that matter before a command's own parser is known, those in a config file included."""
    first = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    first.add_argument("--config", type=Path)
    first.add_argument("--quiet", action="store_true")
    first.add_argument("--results-file", type=Path)
    first.add_argument("--results-format")
    try:
        found = first.parse_known_args(argv)[0]
        values = {} if found.config is None else _read_config(found.config)
    except argparse.ArgumentError:  # the command's own parser says it
        return argparse.Namespace(config=None, quiet="--quiet" in argv, results_file=None, results_format=None)
    except InputError:
        if complain:
            raise
        return argparse.Namespace(config=None, quiet="--quiet" in argv, results_file=None, results_format=None)
    found.quiet = found.quiet or values.get("quiet") == "true"
    if found.results_file is None and isinstance(values.get("results_file"), str):
        found.results_file = Path(values["results_file"])
    found.results_format = found.results_format or values.get("results_format")
    return found


def _read_config(path: Path) -> dict[str, Any]:
    """A YAML file of settings, every value as the text it is: 2:4 stays 2:4, and passes the same checks as a flag's."""
    import yaml

    try:
        values = yaml.load(path.read_text(), Loader=yaml.BaseLoader) or {}
    except OSError as error:
        raise InputError(f"the config file {path} cannot be read ({error.strerror}): give --config a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"the config file {path} is not YAML: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(values, dict):
        raise InputError(f"the config file {path} holds no settings: write lines such as 'compression: 0.5'")
    return values


def _settings(path: Path, made: argparse.ArgumentParser) -> dict[str, Any]:
    """The settings of a config file as values of a parser's flags; an empty one stays at its default."""
    actions = {
        option.lstrip("-").replace("-", "_"): action
        for action in made._actions
        for option in action.option_strings
        if option.startswith("--") and action.dest not in ("help", "config")
    }
    settings = {}
    for key, text in _read_config(path).items():
        action = actions.get(key.replace("-", "_"))
        if action is None:
            near = difflib.get_close_matches(key, actions, n=1)
            hint = f", did you mean {near[0]}?" if near else f" (see {made.prog} --help)"
            raise InputError(f"{path}: unknown setting {key!r}{hint}")
        if text == "":
            continue
        if not isinstance(text, str):
            raise InputError(f"{path}: {key} takes one value, not {text!r}")
        if action.nargs == 0:
            if text.lower() not in ("true", "false"):
                raise InputError(f"{path}: {key} is true or false, not {text!r}")
            settings[action.dest] = text.lower() == "true"
            continue
        try:
            settings[action.dest] = made._get_value(action, text)
            made._check_value(action, settings[action.dest])
        except argparse.ArgumentError as error:
            raise InputError(f"{path}: {key}: {error.message}") from None
    return settings


def run(main: Callable[[list[str]], dict[str, Any]], argv: list[str] | None = None) -> int:
    """Runs a command: sets up logging, turns errors into one line and an exit status, prints the JSON line.

    Returns:
        0 done, 1 a failure inside, 2 bad usage or bad input, 130 Ctrl-C.
    """
    argv = sys.argv[1:] if argv is None else argv
    flags = _first_look(argv, complain=False)
    _set_up_logging(flags.quiet or os.environ.get("RANK", "0") != "0")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a polite kill ends like Ctrl-C
    try:
        result = main(argv)
        if os.environ.get("RANK", "0") != "0":  # of several processes the first one speaks
            return 0
        line = json.dumps(result)
        if flags.results_file is not None:
            write_results(flags.results_file, flags.results_format, result, line)
        print(line, flush=True)
        return 0
    except InputError as error:
        return _fail(error, 2)
    except RunError as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except MemoryError:
        return _fail("out of memory: lower --batch-size or --nsamples, or set --memory-limit", 1)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains again when it exits
        return _fail("nobody reads the output any more", 1)
    except OSError as error:
        return _fail(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}", 1)
    except Exception as error:
        if os.environ.get("VITOATS_TRACEBACK"):
            raise
        return _fail(f"{type(error).__name__}: {' '.join(str(error).split())[:300]} (VITOATS_TRACEBACK=1 shows where)", 1)


def _fail(message: object, status: int) -> int:
    stderr.print(f"error: {message}", style="bold red", markup=False, highlight=False, soft_wrap=True)
    return status


def _set_up_logging(quiet: bool) -> None:
    handler: logging.Handler = RichHandler(
        console=stderr, show_time=False, show_path=False, show_level=False, markup=False, highlighter=None
    )
    if not stderr.is_terminal:
        handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.handlers[:] = [handler]
    log.propagate = False
    log.setLevel(logging.WARNING if quiet else logging.INFO)
    logging.getLogger("timm").setLevel(logging.ERROR)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


class Bar:
    """A progress bar on stderr where that is a terminal; a line now and then where it is not; nothing when quiet.

    Use it as a context manager; ``update`` takes what is done, of what, and a word on it.
    """

    LINES = 10  # about how many lines a bar becomes without a terminal

    def __init__(self, title: str, quiet: bool):
        self.title, self.quiet = title, quiet
        self._said = -1
        self._bar = Progress(
            TextColumn(title), BarColumn(), TextColumn("{task.completed:.0f}/{task.total:.0f}"), TimeElapsedColumn(),
            TextColumn("{task.description}"), console=stderr, transient=True, disable=quiet or not stderr.is_terminal,
        )  # fmt: skip
        self._task = self._bar.add_task("", total=1)

    def __enter__(self) -> "Bar":
        self._bar.start()
        return self

    def __exit__(self, *_):
        self._bar.stop()

    def update(self, done: int, total: int, what: str = "") -> None:
        self._bar.update(self._task, completed=done, total=total, description=what)
        part = done * self.LINES // max(total, 1)
        if not self.quiet and not stderr.is_terminal and part > self._said:
            self._said = part
            log.info("%s %d/%d %s", self.title, done, total, what)


def set_threads(threads: int) -> int:
    """Sets torch's CPU threads; 0 takes all cores. Returns how many there are."""
    import torch

    if threads:
        torch.set_num_threads(threads)
    return torch.get_num_threads()


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor() -> str:
    """What runs this: the processor's name and how many cores there are."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def check_device(device: str) -> str:
    """Checks that torch has the device.

    Raises:
        InputError: it has not.
    """
    import torch

    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError):
        raise InputError(f"the device {device!r} cannot be used here: use --device cpu") from None
    return device


def check_output_folder(output: Path, overwrite: bool | None = None) -> None:
    """Refuses an output folder that exists or cannot be made.

    Args:
        output: the folder.
        overwrite: it may be replaced if compress wrote it; None where the command has no such flag.

    Raises:
        InputError: it exists, or cannot be a folder.
    """
    if output.is_file():
        raise InputError(f"{output} is a file: give --output a folder")
    if output.exists() and any(output.iterdir()):
        if not overwrite:
            remedy = "give another --output" if overwrite is None else "add --overwrite to replace it, or give another --output"
            raise InputError(f"the folder {output} exists: {remedy}")
        if not (output / "vitoats.json").is_file():
            raise InputError(f"{output} was not written by compress, so --overwrite does not touch it: give another --output")
    _check_parents(output)


def check_output_file(output: Path, overwrite: bool) -> None:
    """Refuses an output file that exists, unless it may be replaced, or that cannot be made.

    Raises:
        InputError: it exists, or cannot be a file.
    """
    _check_parents(output)
    if output.is_dir():
        raise InputError(f"{output} is a folder: give --output a file")
    if output.exists() and not overwrite:
        raise InputError(f"{output} exists: add --overwrite to replace it")


def _check_parents(output: Path) -> None:
    for parent in output.absolute().parents:
        if parent.exists():
            if not parent.is_dir() or not os.access(parent, os.W_OK):
                raise InputError(f"{output} cannot be written, {parent} is no folder to write to: give another --output")
            return
