"""Files that vitoats writes for itself to read again: finished blocks, measurements, features.

Each holds a digest of its content and of the key under which it was written, so that a file which was damaged, copied or
renamed is detected. Reading such a file raises ``UnfitError``, and the caller recomputes the content.

    NAME.json           {"sha256": "...", "values": ...}
    NAME.safetensors    tensors, and in the metadata "sha256" and "values" (JSON)
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from vitoats.common.errors import RunError
from vitoats.common.files import REMEDY, atomic_write
from vitoats.common.fingerprint import json_sha256, tensors_sha256
from vitoats.common.json_files import LARGEST, parse_json
from vitoats.common.tensor_files import save_tensors
from vitoats.common.whole_files import check_regular, read_text


class UnfitError(ValueError):
    """A kept file cannot be read, or its content was not written under this key."""


def write_values(path: Path, key: str, values: Any, remedy: str = REMEDY) -> None:
    """Writes plain values as JSON.

    Raises:
        RunError: the file cannot be written; ``remedy`` is the advice in its message.
        ValueError: a value is NaN or infinite.
    """
    text = json.dumps({"sha256": json_sha256([key, values]), "values": values}, allow_nan=False)
    _check_place(path)
    with atomic_write(path, remedy) as partial:
        partial.write_text(text)


def read_values(path: Path, key: str) -> Any:
    """The values that ``write_values`` wrote.

    Raises:
        FileNotFoundError: the file does not exist.
        UnfitError: the file was not written under this key, or is damaged.
    """
    try:
        held = parse_json(read_text(path, LARGEST))
        if held["sha256"] != json_sha256([key, held["values"]]):
            raise UnfitError("it is not what was written under this name")
        return held["values"]
    except (FileNotFoundError, NotADirectoryError):
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _unfit(error) from None


def write_tensors(path: Path, key: str, tensors: Mapping[str, Tensor], values: Any, remedy: str) -> None:
    """Writes tensors, with plain values in the metadata.

    Raises:
        RunError: the file cannot be written; ``remedy`` is the advice in its message.
    """
    metadata = {"sha256": _sha256(key, tensors, values), "values": json.dumps(values)}
    _check_place(path)
    with atomic_write(path, remedy) as partial:
        save_tensors(partial, tensors, metadata)


def read_tensors(path: Path, key: str) -> tuple[dict[str, Tensor], Any]:
    """The tensors and values that ``write_tensors`` wrote.

    Raises:
        FileNotFoundError: the file does not exist.
        UnfitError: the file was not written under this key, or is damaged.
    """
    try:
        check_regular(path)
        with safetensors.safe_open(str(path), "pt") as file:
            tensors = {name: file.get_tensor(name) for name in list(file.keys())}
            metadata = file.metadata() or {}
        values = parse_json(metadata["values"])
        if metadata["sha256"] != _sha256(key, tensors, values):
            raise UnfitError("it is not what was written under this name")
        return tensors, values
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise _unfit(error) from None


def _check_place(path: Path) -> None:
    """Raises RunError if something else than a file is in the way, such as a pipe, to which a write would wait."""
    if path.exists() and not path.is_file():
        raise RunError(f"{path} is no regular file: delete it")


def _sha256(key: str, tensors: Mapping[str, Tensor], values: Any) -> str:
    return json_sha256([key, tensors_sha256(tensors), values])


def _unfit(error: Exception) -> UnfitError:
    return error if isinstance(error, UnfitError) else UnfitError(f"it is damaged, {type(error).__name__}")
