"""The manifest of a run: everything that says how its result came about, enough to do it again.

It lies beside the result, with a log: ``run.json`` and ``run.log`` in a folder, ``NAME.run.json`` and ``NAME.run.log`` beside a
file. Only these two hold dates, so that the same run writes the same result. docs/formats.md has the keys.
"""

import contextlib
import dataclasses
import importlib.metadata
import os
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import vitoats
from vitoats.common.errors import InputError
from vitoats.common.file_digests import file_sha256
from vitoats.common.files import atomic_write
from vitoats.common.json_files import read_json, to_json
from vitoats.common.machine import cores, processor
from vitoats.common.noted import Digests

VERSION = 1
MANIFEST, LOG = "run.json", "run.log"
PACKAGES = (
    *("torch", "torchvision", "timm", "transformers", "tokenizers", "numpy", "pillow", "safetensors"),
    *("onnx", "onnxruntime", "onnxscript", "onnxruntime-genai"),
)
ENVIRONMENT = ("OMP_NUM_THREADS",)  # and VITOATS_...: variables that change results


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What is known of a run.

    Attributes:
        command: the command's name, as ``vitoats`` takes it.
        argv: its flags as they were typed.
        settings: the values of all flags, defaults and those of a config file among them.
        started: date and time in UTC.
        seconds: how long it took.
        versions: of vitoats, with the git commit where it runs from a checkout, of Python, and of the packages that it uses.
        machine: processor, cores for the process, threads, and processes.
        environment: those environment variables that change results.
        inputs: SHA-256 digests by name.
        outputs: SHA-256 of each file, by its path below the folder, or its name.
        result: the JSON line.
    """

    command: str
    argv: list[str]
    settings: dict[str, Any]
    started: str
    seconds: float
    versions: dict[str, str]
    machine: dict[str, Any]
    environment: dict[str, str]
    inputs: Digests
    outputs: dict[str, str]
    result: dict[str, Any]

    def write(self, result: Path) -> None:
        """Writes the manifest of a folder or file.

        Raises:
            RunError: it cannot be written.
        """
        with atomic_write(manifest_path(result), part_of=result) as partial:
            partial.write_text(to_json({"manifest_version": VERSION, **dataclasses.asdict(self)}, indent=1) + "\n")


def manifest_path(result: Path) -> Path:
    """Where the manifest of a folder or file is."""
    return result / MANIFEST if result.is_dir() else result.with_name(f"{result.name}.{MANIFEST}")


def log_path(result: Path) -> Path:
    """Where the log of the run is that wrote a folder or file."""
    return result / LOG if result.is_dir() else result.with_name(f"{result.name}.{LOG}")


def is_record(name: str) -> bool:
    """Whether a file of this name is a manifest or a log, which comparisons and uploads of results leave out."""
    return name in (MANIFEST, LOG) or name.endswith((f".{MANIFEST}", f".{LOG}"))


def read_manifest(result: Path) -> Manifest:
    """Reads the manifest of a folder or file, as untrusted data.

    Raises:
        InputError: there is none, or it is damaged.
    """
    path = manifest_path(result)
    if not path.is_file():
        raise InputError(f"{result} has no manifest ({path} is not there): run its command again, which writes one")
    found = read_json(path)
    try:
        if found["manifest_version"] != VERSION:
            raise ValueError(f"it has version {found['manifest_version']!r:.20}, this vitoats reads {VERSION}")
        manifest = Manifest(**{field.name: found[field.name] for field in dataclasses.fields(Manifest)})
        _check(manifest)
    except KeyError as error:
        raise InputError(f"{path} is damaged (it has no {error}): run the command again") from None
    except (AttributeError, TypeError):
        raise InputError(f"{path} is damaged (a value has another type): run the command again") from None
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}): run the command again") from None
    return manifest


def _check(manifest: Manifest) -> None:
    """Raises ValueError if a value that is used has another type."""
    texts = (manifest.argv, manifest.versions.values(), manifest.environment.values(), manifest.outputs.values())
    digests = manifest.inputs.values()
    if (
        not isinstance(manifest.command, str)
        or not isinstance(manifest.argv, list)
        or not isinstance(manifest.machine, dict)
        or not isinstance(manifest.result, dict)
        or not all(isinstance(text, str) for some in texts for text in some)
        or not all(isinstance(some, list) and all(isinstance(one, str) for one in some) for some in digests)
    ):
        raise ValueError("a value has another type")
    if any(Path(name).is_absolute() or ".." in Path(name).parts for name in manifest.outputs):
        raise ValueError("an output is outside the result")


def versions() -> dict[str, str]:
    """The versions of Python, vitoats and the packages that it uses; the git commit where vitoats runs from a checkout."""
    found = {"python": platform.python_version(), "vitoats": vitoats.__version__}
    if commit := _commit(Path(vitoats.__file__).parents[1]):
        found["commit"] = commit
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _commit(checkout: Path) -> str:
    """The commit of a checkout, with "-dirty" where files differ from it; "" if there is none."""
    if not (checkout / ".git").exists():
        return ""
    command = ["git", "-C", str(checkout), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def machine(threads: int) -> dict[str, Any]:
    """The processor and what the run uses of it."""
    return {"processor": processor(), "cores": cores(), "threads": threads, "processes": int(os.environ.get("WORLD_SIZE", 1))}


def environment() -> dict[str, str]:
    """The environment variables that change results."""
    return {name: os.environ[name] for name in sorted(os.environ) if name in ENVIRONMENT or name.startswith("VITOATS_")}


def output_digests(result: Path) -> dict[str, str]:
    """SHA-256 of each file of a result, by its path below the folder, or its name; manifest and log are left out.

    The second file of an ONNX model is a part of the result.
    """
    if not result.is_dir():
        return {path.name: file_sha256(path) for path in (result, result.with_name(f"{result.name}.data")) if path.is_file()}
    files = (path for path in sorted(result.rglob("*")) if path.is_file())
    return {str(path.relative_to(result)): file_sha256(path) for path in files if not is_record(path.name)}
