"""The finished parts of a long measurement, in the user's cache, so that the same measurement goes on after an interruption."""

import logging
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vitoats.common import ranks
from vitoats.common.cache import SPACE, cache_file
from vitoats.common.errors import RunError
from vitoats.common.files import remove_file
from vitoats.common.kept_files import UnfitError, read_values, write_values

log = logging.getLogger("vitoats")

SECONDS = 5.0  # between writes


class Unfinished:
    """Parts of a measurement, plain values, in the order in which they are made.

    They are written now and then, and removed once the measurement is complete and its result is kept. A file that does not fit
    is ignored. Of several processes, the first one writes and reads.

    Attributes:
        parts: what has been made so far.
    """

    def __init__(self, name: str, folder: Path | None = None):
        """Reads what an interrupted measurement has left.

        Args:
            name: identifies everything that the parts depend on.
            folder: where they are kept instead of in the user's cache.
        """
        self._path, self._written, self._warned = _path(name, folder), time.monotonic(), False
        self.parts: list[Any] = ranks.from_first(self._read)
        if self.parts and ranks.is_first():
            log.info("going on with an interrupted measurement: %d parts of it are in %s", len(self.parts), self._path)

    def _read(self) -> list[Any]:
        try:
            return list(read_values(self._path, self._path.name))
        except (FileNotFoundError, NotADirectoryError):
            return []
        except UnfitError as error:
            log.warning("%s does not fit and is made anew: %s", self._path, error)
            return []

    def add(self, parts: Iterable[Any]) -> None:
        """Appends parts, and writes all of them if the last time was ``SECONDS`` ago."""
        self.parts += parts
        if not ranks.is_first() or time.monotonic() - self._written < SECONDS:
            return
        try:
            write_values(self._path, self._path.name, self.parts, SPACE)
        except (RunError, ValueError) as error:  # a cache that cannot be written is no reason to stop
            log.log(logging.DEBUG if self._warned else logging.WARNING, "not kept: %s", error)
            self._warned = True
        self._written = time.monotonic()

    def remove(self) -> None:
        """Removes the file, since the measurement is complete."""
        _remove(self._path)


def remove_unfinished(name: str) -> None:
    """Removes the parts of a measurement in the user's cache, since it is complete."""
    _remove(_path(name, None))


def _path(name: str, folder: Path | None) -> Path:
    return cache_file(f"{name}.unfinished") if folder is None else folder / f"{name}.unfinished.json"


def _remove(path: Path) -> None:
    if ranks.is_first():
        remove_file(path)
