"""Code shared by all commands: loading a model, errors and exit statuses, progress, and the JSON line at the end."""

import argparse
import logging
import os
import signal
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from vitoats.cli.config_file import first_look
from vitoats.cli.results import write_results
from vitoats.cli.wording import in_flags
from vitoats.common.errors import InputError, RunError, SilentError
from vitoats.common.json_files import to_json
from vitoats.common.outputs import check_results_file

if TYPE_CHECKING:
    from vitoats.loading.loaded import LoadedModel
    from vitoats.loading.source import ModelSource

MODEL_FLAGS = (
    *("checkpoint", "random_weights", "img_size", "crop_mode", "pos_resample", "head", "head_layers", "head_name"),
    *("model_kwargs", "mean", "std", "interpolation", "crop_pct"),
)

LANGUAGE = ("accelerate", "gguf", "pyarrow", "transformers")  # packages of the extra lm; the others are those of compress
PAGE = ("jinja2", "markupsafe", "vl_convert")  # of the extra report
ABOUT_TORCH = ("checkpoint", "random_weights", "pos_resample", "model_kwargs", "amp")

log = logging.getLogger("vitoats")
stderr = Console(stderr=True)


def load(args: argparse.Namespace, with_head: bool = True) -> "LoadedModel":
    """Loads the model that the model flags name."""
    from vitoats.loading.source import open_model

    return open_model(source(args), with_head)


def source(args: argparse.Namespace, name: str | None = None) -> "ModelSource":
    """The model that the model flags name, or another ``name`` with the same flags."""
    from vitoats.loading.source import ModelSource

    return ModelSource(name=name or args.model, **model_settings(args))


def is_language_model(name: str) -> bool:
    """Whether --model names a language model."""
    from vitoats.loading.language_models import is_language_model

    return is_language_model(name, look_at_hub=True)


def model_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The values of the model flags; --model-kwargs as a dictionary."""
    given = {name: getattr(args, name) for name in MODEL_FLAGS if name in args}
    return given | ({"model_kwargs": dict(args.model_kwargs)} if given.get("model_kwargs") else {})


def refuse_for_files(args: argparse.Namespace) -> None:
    """Refuses the flags that only a torch model heeds.

    Raises:
        InputError: one of them is given.
    """
    for name in ABOUT_TORCH:
        if getattr(args, name, None):
            raise InputError(f"an ONNX file is evaluated as it is: leave --{name.replace('_', '-')} out")
    if args.device != "cpu":
        raise InputError("an ONNX file runs on the CPU: leave --device out")


def run(main: Callable[[list[str]], dict[str, Any]], argv: list[str] | None = None) -> int:
    """Runs a command: sets up logging, turns errors into one line and an exit status, prints the JSON line.

    Returns:
        the exit status: 0 for success, 1 for a failure during the run, 2 for bad usage or bad input, 130 for Ctrl-C.
    """
    argv = sys.argv[1:] if argv is None else argv
    flags = first_look(argv, complain=False)
    _set_up_logging(flags.quiet or os.environ.get("RANK", "0") != "0")
    for polite in (signal.SIGTERM, signal.SIGHUP):  # treat a plain kill and a closed terminal like Ctrl-C
        if signal.getsignal(polite) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(polite, signal.default_int_handler)
    try:
        if flags.results_file is not None:
            check_results_file(flags.results_file)
        elif flags.results_format is not None:
            raise InputError("--results-format is that of --results-file: add that, or leave it out")
        result = main(argv)
        if os.environ.get("RANK", "0") != "0":  # only the first of several processes prints
            return 0
        line = to_json(result)
        if flags.results_file is not None:
            write_results(flags.results_file, flags.results_format, result, line)
        print(line, flush=True)
        return 0
    except InputError as error:
        return _fail(in_flags(str(error)), 2)
    except RunError as error:
        return _fail(in_flags(str(error)), 1)
    except SilentError:
        return 1
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except ModuleNotFoundError as error:
        if (error.name or "vitoats").startswith("vitoats"):
            raise
        extra = "lm" if error.name in LANGUAGE else "report" if error.name in PAGE else "compress"
        return _fail(f"the package {error.name} is missing: pip install 'vitoats[{extra}]'", 2)
    except MemoryError:
        return _fail("out of memory: lower --batch-size or --nsamples, or set --memory-limit", 1)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # otherwise Python reports the error again at exit
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
    handler.setFormatter(InFlags("%(message)s"))
    handler.setLevel(logging.WARNING if quiet else logging.INFO)
    log.handlers[:] = [handler]
    log.propagate = False
    log.setLevel(logging.INFO)
    logging.getLogger("timm").setLevel(logging.ERROR)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


class InFlags(logging.Formatter):
    """Formats messages with arguments written as flags."""

    def format(self, record: logging.LogRecord) -> str:
        return in_flags(super().format(record))


class Bar:
    """A progress bar on stderr if that is a terminal, otherwise an occasional log line; nothing if ``quiet``.

    Use it as a context manager; ``update`` takes the steps done, the total and a short description.
    """

    LINES = 10  # approximate number of log lines without a terminal

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


class Bars:
    """A progress bar for each stage of long work, one after the other (``common.progress``). Use it as a context manager."""

    def __init__(self, quiet: bool):
        self.quiet = quiet
        self._bar: Bar | None = None

    def __enter__(self) -> "Bars":
        return self

    def __exit__(self, *_):
        if self._bar:
            self._bar.__exit__()
            self._bar = None

    def __call__(self, stage: str, done: int, total: int, what: str) -> None:
        if self._bar is None or self._bar.title != stage:
            self.__exit__()
            self._bar = Bar(stage, self.quiet).__enter__()
        self._bar.update(done, total, what)
