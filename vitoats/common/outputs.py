"""Checks that an output can be written, before the work starts."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from vitoats.common.errors import InputError


def check_output_folder(
    output: Path, overwrite: bool | None = None, mark: str = "vitoats.json", command: str = "compress"
) -> None:
    """Refuses an output folder that is not empty, unless it may be replaced, or that cannot be created.

    Args:
        output: the folder.
        overwrite: whether a folder that the command wrote may be replaced; None if the command has no such option.
        mark: the file that such a folder has.
        command: the command.

    Raises:
        InputError: the folder is not empty and may not be replaced, or cannot be created.
    """
    if output.is_file():
        raise InputError(f"{output} is a file: give `output` a folder")
    if output.exists() and any(output.iterdir()):
        if not overwrite:
            remedy = "give another `output`" if overwrite is None else "add `overwrite` to replace it, or give another `output`"
            raise InputError(f"the folder {output} exists: {remedy}")
        if not (output / mark).is_file():
            raise InputError(f"{output} was not written by {command}, so `overwrite` does not touch it: give another `output`")
    check_parents(output)


def check_output_file(output: Path, overwrite: bool) -> None:
    """Refuses an output file that exists, unless ``overwrite`` is given, or that cannot be created.

    Raises:
        InputError: the file exists or cannot be created.
    """
    check_parents(output)
    if output.is_dir():
        raise InputError(f"{output} is a folder: give `output` a file")
    if output.exists() and not overwrite:
        raise InputError(f"{output} exists: add `overwrite` to replace it")


def check_results_file(path: Path) -> None:
    """Refuses a file for results that cannot be written; it may exist, and be a device.

    Raises:
        InputError: it is a folder, or cannot be created.
    """
    if path.is_dir():
        raise InputError(f"{path} is a folder: give `results_file` a file")
    if path.is_file() or not path.exists():
        check_parents(path, "results_file")


def check_parents(output: Path, field: str = "output") -> None:
    """Refuses an output whose nearest existing parent is not a writable folder.

    Args:
        output: the file or folder to write.
        field: the argument that names it.

    Raises:
        InputError: the output cannot be created there.
    """
    _check_writable(output, output.absolute().parents, field)


def check_folder(folder: Path, field: str = "output") -> None:
    """Refuses a folder to write into that is none, or whose nearest existing parent is none.

    Args:
        folder: exists, or will be made.
        field: the argument that names it.

    Raises:
        InputError: no files can be written there.
    """
    _check_writable(folder, (folder.absolute(), *folder.absolute().parents), field)


def _check_writable(output: Path, places: Sequence[Path], field: str) -> None:
    """Refuses ``output`` where the first of ``places`` that exists takes no files."""
    place = next(place for place in places if place.exists())
    if not _takes_files(place):
        raise InputError(f"{output} cannot be written, {place} is no folder to write to: give another `{field}`")


def _takes_files(folder: Path) -> bool:
    """Whether a file can be created there; permissions alone do not say that, for root or in /proc."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False
