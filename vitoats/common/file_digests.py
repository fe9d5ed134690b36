"""Digests of files."""

import hashlib
from collections.abc import Iterable
from pathlib import Path


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_sha256(paths: Iterable[Path]) -> str:
    """A digest of several files: of their names and contents; those that do not exist are left out."""
    lines = sorted(f"{file_sha256(path)} {path.name}" for path in paths if path.is_file())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
