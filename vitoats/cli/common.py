"""What all commands share: loading a model, errors and exit statuses, progress, checks, and the JSON line at the end."""

import argparse
import json
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from vitoats.cli.config_file import first_look
from vitoats.cli.results import write_results
from vitoats.cli.wording import in_flags
from vitoats.common.errors import InputError, RunError

if TYPE_CHECKING:
    from vitoats.loading.load import LoadedModel

log = logging.getLogger("vitoats")
stderr = Console(stderr=True)


def load(args: argparse.Namespace, with_head: bool = True) -> "LoadedModel":
    """Loads the model that the model flags name, and says where its weights come from."""
    from vitoats.loading.load import load_model

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


def run(main: Callable[[list[str]], dict[str, Any]], argv: list[str] | None = None) -> int:
    """Runs a command: sets up logging, turns errors into one line and an exit status, prints the JSON line.

    Returns:
        0 done, 1 a failure inside, 2 bad usage or bad input, 130 Ctrl-C.
    """
    argv = sys.argv[1:] if argv is None else argv
    flags = first_look(argv, complain=False)
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
        return _fail(in_flags(str(error)), 2)
    except RunError as error:
        return _fail(in_flags(str(error)), 1)
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
    handler.setFormatter(_InFlags("%(message)s"))
    log.handlers[:] = [handler]
    log.propagate = False
    log.setLevel(logging.WARNING if quiet else logging.INFO)
    logging.getLogger("timm").setLevel(logging.ERROR)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


class _InFlags(logging.Formatter):
    """Words messages as the command line does."""

    def format(self, record: logging.LogRecord) -> str:
        return in_flags(super().format(record))


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
