"""Whether an output can be written, asked before the work starts."""

import os
from pathlib import Path

from vitoats.common.errors import InputError


def check_output_folder(output: Path, overwrite: bool | None = None) -> None:
    """Refuses an output folder that exists or cannot be made.

    Args:
        output: the folder.
        overwrite: it may be replaced if compress wrote it; None where there is no such choice.

    Raises:
        InputError: it exists, or cannot be a folder.
    """
    if output.is_file():
        raise InputError(f"{output} is a file: give `output` a folder")
    if output.exists() and any(output.iterdir()):
        if not overwrite:
            remedy = "give another `output`" if overwrite is None else "add `overwrite` to replace it, or give another `output`"
            raise InputError(f"the folder {output} exists: {remedy}")
        if not (output / "vitoats.json").is_file():
            raise InputError(f"{output} was not written by compress, so `overwrite` does not touch it: give another `output`")
    check_parents(output)


def check_output_file(output: Path, overwrite: bool) -> None:
    """Refuses an output file that exists, unless it may be replaced, or that cannot be made.

    Raises:
        InputError: it exists, or cannot be a file.
    """
    check_parents(output)
    if output.is_dir():
        raise InputError(f"{output} is a folder: give `output` a file")
    if output.exists() and not overwrite:
        raise InputError(f"{output} exists: add `overwrite` to replace it")


def check_parents(output: Path) -> None:
    """Refuses an output below a file, or below a folder that cannot be written to.

    Raises:
        InputError: it is such a one.
    """
    for parent in output.absolute().parents:
        if parent.exists():
            if not parent.is_dir() or not os.access(parent, os.W_OK):
                raise InputError(f"{output} cannot be written, {parent} is no folder to write to: give another `output`")
            return
