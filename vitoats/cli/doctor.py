"""Checks this installation: processor, kernels and why others do not run, versions, and a product by each kernel.

    vitoats doctor
    vitoats doctor --results-file doctor.json

What is missing for an extra is listed with the command that installs it.
"""

import importlib.metadata
import logging
import os
import platform
import re
import shutil
from typing import Any

from vitoats import __version__
from vitoats.cli import config_file, flags
from vitoats.common.errors import InputError, RunError
from vitoats.common.machine import cores, processor
from vitoats.runtime.library import ISA_VARIABLE, library_path

log = logging.getLogger("vitoats")

COMPILERS = ("c++", "g++", "clang++")


def main(argv: list[str]) -> dict[str, Any]:
    """Parses flags, checks, and logs what it finds; returns the JSON line.

    Raises:
        InputError: VITOATS_ISA names a kernel that does not run here.
        RunError: a kernel computes something wrong.
    """
    config_file.parse(flags.parser("doctor", __doc__), argv)
    log.info("vitoats %s, Python %s, %s", __version__, platform.python_version(), platform.platform())
    log.info("processor: %s, %d for this process", processor(), cores())
    versions = _versions()
    if (path := library_path()) is None:
        compiler = next((found for name in COMPILERS if (found := shutil.which(name))), None)
        remedy = f"install vitoats again, {compiler} is there" if compiler else "install a C++17 compiler, then vitoats again"
        log.warning("there is no native library, so exported files run at dense speed: %s", remedy)
        return {"version": __version__, "processor": processor(), "isa": None, "kernels": {}, "versions": versions}
    log.info("native library: %s", path)
    kernels, isa = _kernels()
    return {"version": __version__, "processor": processor(), "isa": isa, "kernels": kernels, "versions": versions}


def _versions() -> dict[str, str | None]:
    """Logs and returns the versions of the libraries that vitoats needs, by extra; None for those that are not installed."""
    versions: dict[str, str | None] = {}
    missing: dict[str, list[str]] = {}
    for requirement in importlib.metadata.requires("vitoats") or []:
        name = re.split(r"[^\w.-]", requirement, maxsplit=1)[0]
        extra = found.group(1) if (found := re.search(r"extra == ['\"]([\w-]+)['\"]", requirement)) else ""
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
            missing.setdefault(extra, []).append(name)
    log.info("versions: %s", ", ".join(f"{name} {version}" for name, version in versions.items() if version))
    for extra, names in missing.items():
        remedy = f"pip install 'vitoats[{extra}]'" if extra else "pip install vitoats"
        log.info("not installed: %s (%s)", ", ".join(names), remedy)
    return versions


def _kernels() -> tuple[dict[str, dict[str, Any]], str]:
    """Logs which kernels run and how exact they are; returns that, and the name of the one that new sessions use."""
    from vitoats.runtime.instruction_sets import instruction_sets
    from vitoats.runtime.library import isa

    reasons = instruction_sets()
    if not isa():
        usable = ", ".join(name for name, reason in reasons.items() if not reason)
        raise InputError(f"{ISA_VARIABLE}={os.environ[ISA_VARIABLE]} does not run here: unset it, or set it to one of {usable}")
    errors: dict[str, dict[str, float]] = {}
    try:
        from vitoats.benchmark.self_check import TOLERANCE, kernel_errors

        errors = kernel_errors()
    except ModuleNotFoundError as error:
        log.info("products are not checked without %s: pip install 'vitoats[compress]'", error.name)
    kernels = {name: {"runs": not reason, "reason": reason, "errors": errors.get(name)} for name, reason in reasons.items()}
    for name, reason in reasons.items():
        exact = ", ".join(f"{kind} {error:.0e}" for kind, error in errors.get(name, {}).items())
        chosen = ", used by new sessions" if name == isa() else ""
        log.info("kernel %-12s %s", name, reason or f"runs{chosen}" + (f"; largest error: {exact}" if exact else ""))
    wrong = [f"{name} ({kind})" for name, found in errors.items() for kind, e in found.items() if not e <= TOLERANCE[kind]]
    if wrong:
        raise RunError(f"wrong results by {', '.join(wrong)}: please report this, and set {ISA_VARIABLE} to another kernel")
    return kernels, isa()
