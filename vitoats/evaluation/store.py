"""Finished rows of a comparison on disk: an interrupted comparison can resume, and never mixes rows of different settings."""

import json
import logging
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vitoats.common.errors import InputError
from vitoats.common.file_digests import file_sha256
from vitoats.common.files import atomic_write, tidy
from vitoats.common.fingerprint import json_sha256
from vitoats.common.json_files import LARGEST, parse_json, to_json
from vitoats.common.kept_files import UnfitError
from vitoats.common.whole_files import check_regular, read_text

log = logging.getLogger("vitoats")

ABOUT = "comparison.json"
REMEDY = "free some space and repeat the command"


class RowStore:
    """A folder with ``comparison.json``, the settings shared by all rows, and for each finished row

        rows/<name>.json    its own settings and its figures
        rows/<name>.npz     figures of each image

    The JSON is written last, with a digest of both files. A row that does not match its digest is computed again.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]):
        """Opens or creates the folder.

        Raises:
            InputError: the folder holds a comparison with other settings, or something else.
            RunError: the folder is not writable.
        """
        self.folder = folder
        self.rows = folder / "rows"
        about = folder / ABOUT
        tidy(about)
        if any(self.rows.glob("*.json")):
            changed = _changes(_settings_of(about), settings)
            if changed:
                raise InputError(
                    f"{folder} holds a comparison with other settings ({changed}): repeat those, or give another `output`"
                )
        elif not about.is_file() and (folder.is_file() or (folder.exists() and any(folder.iterdir()))):
            raise InputError(f"{folder} exists and holds no comparison: give another `output`")
        else:
            _write(about, settings)

    def load(self, name: str, settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
        """A finished row and its figures of each image; None if there is none or it is damaged.

        Raises:
            InputError: the row has other settings.
        """
        path, arrays_path = self._file(name, ".json"), self._file(name, ".npz")
        if not path.is_file():
            return None
        try:
            found = parse_json(read_text(path, LARGEST))
            if found["sha256"] != _sha256(name, found["settings"], found["row"], arrays_path):
                raise UnfitError("its digest is another")
            with np.load(arrays_path, allow_pickle=False) as arrays:
                row, of_images = found["row"], dict(arrays)
        except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
            log.warning("%s is damaged and is made anew: %s", path, error or type(error).__name__)
            return None
        if changed := _changes(found["settings"], settings):
            raise InputError(
                f"{path} was made with other settings ({changed}): repeat those, delete the file, "
                f"or name the method anew (`methods` NEW_NAME=METHOD)"
            )
        return row, of_images

    def save(self, name: str, settings: dict[str, Any], row: dict[str, Any], arrays: Mapping[str, Any]) -> None:
        """Writes a finished row.

        Raises:
            RunError: the row cannot be written.
        """
        with atomic_write(self._file(name, ".npz"), REMEDY) as partial, partial.open("wb") as file:
            np.savez(file, **arrays)
        settings, row = _plain(settings), _plain(row)
        digest = _sha256(name, settings, row, self._file(name, ".npz"))
        _write(self._file(name, ".json"), {"settings": settings, "row": row, "sha256": digest})

    def _file(self, name: str, suffix: str) -> Path:
        return self.rows / (name + suffix)


def _settings_of(about: Path) -> dict[str, Any]:
    try:
        found = parse_json(read_text(about, LARGEST))
        if not isinstance(found, dict):
            raise UnfitError("it holds no settings")
        return found
    except (OSError, ValueError) as error:
        raise InputError(f"{about} is damaged ({error}): delete the folder to start anew") from None


def _sha256(name: str, settings: dict[str, Any], row: dict[str, Any], arrays: Path) -> str:
    check_regular(arrays)
    return json_sha256([name, settings, row, file_sha256(arrays)])


def _changes(before: dict[str, Any], now: dict[str, Any]) -> str:
    """What differs between two sets of settings, in words; "" if nothing does."""
    now = _plain(now)
    return ", ".join(
        f"{key} was {_short(before.get(key))} and is now {_short(now.get(key))}"
        for key in dict.fromkeys([*before, *now])
        if before.get(key) != now.get(key)
    )


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """The values as they would be read back: tuples become lists."""
    return json.loads(to_json(values, default=str))


def _write(path: Path, values: dict[str, Any]) -> None:
    with atomic_write(path) as partial:
        partial.write_text(to_json(values, indent=1, default=str))
