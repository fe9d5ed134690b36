"""Finished rows of a comparison on disk, so that an interrupted one goes on, and none is mixed with rows of other settings."""

import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vitoats.common.errors import InputError, RunError

ABOUT = "comparison.json"


class RowStore:
    """A folder with ``comparison.json``, the settings that all rows share, and for each finished row

        rows/<name>.json    its own settings and its figures
        rows/<name>.npz     figures of each image

    The json comes last, and each file appears whole or not at all.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]):
        """Opens or creates the folder.

        Raises:
            InputError: it holds a comparison with other settings, or something else.
            RunError: it cannot be written.
        """
        self.folder = folder
        self.rows = folder / "rows"
        about = folder / ABOUT
        if about.is_file():
            changed = _changes(_read_json(about, "delete the folder to start anew"), settings)
            if changed:
                raise InputError(
                    f"{folder} holds a comparison with other settings ({changed}): repeat those, or give another `output`"
                )
        elif folder.is_file() or (folder.exists() and any(folder.iterdir())):
            raise InputError(f"{folder} exists and holds no comparison: give another `output`")
        else:
            _write(about, _json(settings))

    def load(self, name: str, settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
        """A finished row and its figures of each image, None if there is none.

        Raises:
            InputError: the row is damaged, or has other settings.
        """
        path = self._file(name, ".json")
        if not path.is_file():
            return None
        found = _read_json(path, "delete it to make the row again")
        if changed := _changes(found["settings"], settings):
            raise InputError(
                f"{path} was made with other settings ({changed}): repeat those, delete the file, "
                f"or name the method anew (`methods` NEW_NAME=METHOD)"
            )
        try:
            with np.load(self._file(name, ".npz"), allow_pickle=False) as arrays:
                return found["row"], dict(arrays)
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise InputError(f"{self._file(name, '.npz')} is damaged ({error}): delete {path} to make the row again") from None

    def save(self, name: str, settings: dict[str, Any], row: dict[str, Any], arrays: Mapping[str, Any]) -> None:
        """Writes a finished row."""
        partial = self._file(name, ".writing.npz")
        try:
            self.rows.mkdir(exist_ok=True)
            np.savez(partial, **arrays)
            os.replace(partial, self._file(name, ".npz"))
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise RunError(f"{partial} cannot be written ({error.strerror}): free some space and repeat the command") from None
        _write(self._file(name, ".json"), _json({"settings": settings, "row": row}))

    def _file(self, name: str, suffix: str) -> Path:
        return self.rows / (name + suffix)


def _changes(before: dict[str, Any], now: dict[str, Any]) -> str:
    """What differs between two sets of settings, in words; "" if nothing does."""
    now = json.loads(json.dumps(now, default=str))  # as it would be read: tuples are lists
    return ", ".join(
        f"{key} was {_short(before.get(key))} and is now {_short(now.get(key))}"
        for key in dict.fromkeys([*before, *now])
        if before.get(key) != now.get(key)
    )


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _json(value: object) -> bytes:
    return json.dumps(value, indent=1, default=str).encode()


def _read_json(path: Path, remedy: str) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is damaged ({type(error).__name__}): {remedy}") from None


def _write(path: Path, content: bytes) -> None:
    partial = path.with_name(path.name + ".writing")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        os.replace(partial, path)
    except OSError as error:
        raise RunError(f"{path} cannot be written ({error.strerror}): free some space or give another `output`") from None
