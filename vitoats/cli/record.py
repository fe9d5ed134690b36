"""Runs a command and writes a manifest and a log beside its result (``common.manifest``)."""

import argparse
import contextlib
import datetime
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from vitoats.cli.common import InFlags, log
from vitoats.common import manifest, noted
from vitoats.common.errors import RunError
from vitoats.common.file_digests import file_sha256
from vitoats.common.files import atomic_write, hold
from vitoats.common.machine import cores
from vitoats.common.outputs import check_parents

WRITTEN = ("output", "results_file", "report", "cache")  # flags that name what a command writes
READ = ("model", "folder", "against", "data_dir", "tests", "method", "methods")  # flags whose texts may name files
LOCAL = "local-dir:"

Work = Callable[[argparse.Namespace], dict[str, Any]]


def recorded(
    command: str, args: argparse.Namespace, argv: list[str], work: Work, expected: Mapping[str, list[str]] | None = None
) -> dict[str, Any]:
    """Does a command's work and writes its manifest and log beside --output, or else --results-file.

    --output is locked until they are there, too. The result is whole even if they cannot be written, which is only a warning.

    Args:
        command: the command's name.
        args: its flags.
        argv: the flags as they were typed.
        work: does the work and returns the JSON line.
        expected: the digests of what an earlier run read, by name, if this run repeats it.

    Raises:
        InputError: inputs differ from the expected ones, or another run is writing to --output.
    """
    if os.environ.get("RANK", "0") != "0":  # the first of several processes writes
        return work(args)
    with _locked(args):
        return _recorded(command, args, argv, work, expected or {})


@contextlib.contextmanager
def _locked(args: argparse.Namespace) -> Iterator[None]:
    """Locks --output, unless it is a device; the first of several processes does so itself once all are there."""
    output = getattr(args, "output", None)
    device = output is not None and output.exists() and not (output.is_dir() or output.is_file())
    if output is None or device or getattr(args, "dry_run", False) or "RANK" in os.environ:
        yield
        return
    check_parents(output)
    with hold(output):
        yield


def _recorded(
    command: str, args: argparse.Namespace, argv: list[str], work: Work, expected: Mapping[str, list[str]]
) -> dict[str, Any]:
    settings, started, start = plain(vars(args)), datetime.datetime.now(datetime.UTC), time.perf_counter()
    kept = _KeptLines()
    log.addHandler(kept)
    try:
        with noted.noting(expected) as inputs:
            noted.note(lambda: file_digests(args))
            result = work(args)
    finally:
        log.removeHandler(kept)
    place = getattr(args, "output", None) or args.results_file
    if place is None or getattr(args, "dry_run", False) or (place.exists() and not (place.is_dir() or place.is_file())):
        return result
    outputs = manifest.output_digests(place) if "output" in args else {}
    made = manifest.Manifest(
        command=command,
        argv=argv,
        settings=settings,
        started=started.isoformat(timespec="seconds"),
        seconds=round(time.perf_counter() - start, 1),
        versions=manifest.versions(),
        machine=manifest.machine(_threads()),
        environment=manifest.environment(),
        inputs=inputs,
        outputs=outputs,
        result=result,
    )
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        made.write(place)
        with atomic_write(manifest.log_path(place), part_of=place) as partial:
            partial.write_text("".join(f"{line}\n" for line in kept.lines), encoding="utf-8")
    except RunError as error:
        log.warning("the result is whole, but not the record of how it came about: %s", error)
    return result


def file_digests(args: argparse.Namespace) -> dict[str, str]:
    """SHA-256 of each file that the flags name, by its path as typed: of files, and of the files in a model's folder.

    A file that cannot be read is left to the command, whose error says more.
    """
    found: dict[str, str] = {}
    for path in named_files(args):
        if path.is_dir():
            files = [file for file in sorted(path.iterdir()) if not manifest.is_record(file.name)]
        else:
            files = [path, path.with_name(f"{path.name}.data")] if path.suffix == ".onnx" else [path]
        with contextlib.suppress(OSError):
            found |= {str(file): file_sha256(file) for file in files if file.is_file()}
    return found


def named_files(args: argparse.Namespace) -> Iterator[Path]:
    """The files and the folders of models that flags name; images and texts in folders are noted where they are drawn."""
    for name, value in vars(args).items():
        if name in WRITTEN or value is None:
            continue
        values = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
        for one in values:
            if isinstance(one, Path):
                yield from [one] if one.is_file() else []
            elif isinstance(one, str) and name in READ:
                path = Path(own_method(one) or one.removeprefix(LOCAL))
                if path.is_file() or (name in ("model", "folder", "against") and path.is_dir()):
                    yield path


def own_method(name: str) -> str:
    """The file of a user's own method, ./file.py:name; "" for other names."""
    path, colon, _ = name.rpartition(".py:")
    return f"{path}.py" if colon else ""


def plain(value: Any) -> Any:
    """Flags as plain values for JSON; paths as they were typed."""
    if isinstance(value, dict):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)


def _threads() -> int:
    torch = sys.modules.get("torch")
    return torch.get_num_threads() if torch else cores()


class _KeptLines(logging.Handler):
    """Keeps log messages, each with its time and level, whether or not they are shown."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []
        self.setFormatter(InFlags("%(asctime)s %(levelname)s %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))
