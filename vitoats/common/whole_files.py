"""Looks at a file before it is read: a pipe would keep its reader waiting, and a device such as /dev/zero never ends."""

from pathlib import Path


def check_regular(path: Path, largest: int | None = None) -> None:
    """Checks that a path leads to a regular file.

    Args:
        path: the file, or a link to it.
        largest: the most bytes that it may have; None for any number.

    Raises:
        FileNotFoundError: there is nothing.
        ValueError: it is something else than a file, or too large.
    """
    if not path.is_file():
        if path.exists():
            raise ValueError("it is no regular file")
        raise FileNotFoundError("it is not there")
    if largest is not None and path.stat().st_size > largest:
        raise ValueError(f"it has more than {largest:,} bytes")


def read_text(path: Path, largest: int) -> str:
    """Reads a text in UTF-8.

    Raises:
        FileNotFoundError, ValueError: as for ``check_regular``; or it is no UTF-8.
    """
    check_regular(path, largest)
    return path.read_text(encoding="utf-8")
