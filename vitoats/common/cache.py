"""A cache for results that several commands use. Entries are checked when they are read, and recomputed if invalid."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from platformdirs import user_cache_path
from torch import Tensor

from vitoats.common import ranks
from vitoats.common.errors import RunError
from vitoats.common.files import tidy
from vitoats.common.kept_files import read_tensors, read_values, write_tensors, write_values

T = TypeVar("T")
log = logging.getLogger("vitoats")

SPACE = "free some space to keep it"


def cache_file(name: str) -> Path:
    """The file of a measurement in the user's cache folder."""
    return user_cache_path("vitoats", appauthor=False) / f"{name}.json"


def cached(name: str, read: Callable[[Any], T], make: Callable[[], Any]) -> T:
    """Returns a measurement from the user's cache folder; takes it and stores it there if it is missing or invalid.

    The folder is ~/.cache/vitoats on Linux, or lies below XDG_CACHE_HOME.

    Args:
        name: the file's name, which identifies everything that the measurement depends on.
        read: converts plain values to the measurement; raises ValueError if ``make`` could not have returned them.
        make: takes the measurement; returns plain values, for JSON.
    """
    path = cache_file(name)

    def load() -> Any:
        """Of several processes, the first reads, and all make what it does not find."""
        try:
            held = _accepted(read_values(path, name), read) if ranks.is_first() else None
            problem = None
        except (FileNotFoundError, NotADirectoryError, ValueError) as error:
            held, problem = None, error
        if ranks.from_first(lambda: problem is not None):
            raise problem or FileNotFoundError
        return ranks.from_first(lambda: held)

    def save(made: Any) -> None:
        if ranks.is_first():
            write_values(path, name, made, SPACE)

    return read(_kept(path, load, make, save))


def cached_tensors(path: Path, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Returns tensors from a file; computes them and stores them there if it is missing or invalid.

    Args:
        path: the file, whose name identifies everything that the tensors depend on.
        make: computes the tensors.
    """
    return _kept(
        path,
        load=lambda: read_tensors(path, path.name)[0],
        make=make,
        save=lambda made: write_tensors(path, path.name, made, None, SPACE),
    )


def _accepted(values: Any, read: Callable[[Any], Any]) -> Any:
    read(values)
    return values


def _kept(path: Path, load: Callable[[], T], make: Callable[[], T], save: Callable[[T], None]) -> T:
    try:
        found = load()
        log.info("read from the cache: %s", path)
        if ranks.is_first():
            tidy(path)
        return found
    except (FileNotFoundError, NotADirectoryError):
        pass
    except ValueError as error:
        log.warning("%s does not fit and is made anew: %s", path, error)
    made = make()
    try:
        save(made)
    except (RunError, ValueError) as error:  # a cache that cannot be written is no reason to stop
        log.warning("not kept: %s", error)
    return made
