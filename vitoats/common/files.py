"""Files and folders that appear whole or not at all, and places that one run at a time writes to.

What is written to a place lies beside it as ``.NAME.writing`` until it is complete; a folder that is replaced lies there as
``.NAME.old`` for a moment. Whoever writes holds the lock ``.NAME.lock``, so what a killed run has left is told from what a
living one is writing, and the next one to write there clears it away.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from vitoats.common.errors import InputError, RunError

REMEDY = "free some space or give another `output`"


@contextlib.contextmanager
def atomic_write(path: Path, remedy: str = REMEDY) -> Iterator[Path]:
    """Yields a hidden file's path beside ``path`` to write to, and moves the file into place if all went well.

    A device or a pipe, /dev/stdout for one, is written to directly.

    Raises:
        RunError: it cannot be written; ``remedy`` is what to do about it.
    """
    try:
        if _is_device(path):
            yield path
            return
        target = Path(os.path.realpath(path))
        partial = _beside(target, "writing")
        with hold(target, wait=True, remedy=remedy):
            try:
                yield partial
                _sync(partial)
                os.replace(partial, target)
                _sync(target.parent)
            finally:
                with contextlib.suppress(OSError):
                    partial.unlink()
    except OSError as error:
        raise RunError(f"{path} cannot be written ({error.strerror or error}): {remedy}") from None


@contextlib.contextmanager
def whole_folder(folder: Path, overwrite: bool) -> Iterator[Path]:
    """Yields a hidden folder beside ``folder`` to write files to, and moves it into place if all went well.

    Args:
        folder: where to; an empty one is replaced.
        overwrite: replace one that is not empty, too.

    Raises:
        InputError: the folder exists, or another run is writing to it.
        RunError: something could not be written; nothing is left behind, and an old folder is where it was.
    """
    partial, old = _beside(folder, "writing"), _beside(folder, "old")
    try:
        with hold(folder):
            if not overwrite and folder.is_dir() and any(folder.iterdir()):
                raise InputError(f"the folder {folder} exists: add `overwrite` to replace it, or give another `output`")
            try:
                partial.mkdir()
                yield partial
                for file in (*partial.iterdir(), partial):
                    _sync(file)
                if folder.exists():
                    os.rename(folder, old)
                os.rename(partial, folder)
                _sync(folder.parent)
            finally:
                _clear_up(folder)
    except OSError as error:
        raise RunError(f"{folder} cannot be written ({error.strerror or error}): {REMEDY}") from None


@contextlib.contextmanager
def hold(place: Path, wait: bool = False, remedy: str = REMEDY) -> Iterator[None]:
    """Keeps other runs from writing to a file or folder meanwhile; whoever holds it may hold it again.

    What a killed run has left beside it is cleared away first.

    Args:
        place: the file or folder; it need not exist.
        wait: until another run is done.

    Raises:
        InputError: another run is writing to it.
        RunError: nothing can be written beside it; ``remedy`` is what to do about it.
    """
    path = Path(os.path.realpath(place.parent)) / f".{place.name}.lock"
    lock = FileLock(path, is_singleton=True)  # counts how often this process holds it
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=-1 if wait else 0)
    except Timeout:
        raise InputError(f"another run is writing to {place}: wait until it has ended, or give another `output`") from None
    except OSError as error:
        raise RunError(f"{place} cannot be written ({error.strerror or error}): {remedy}") from None
    try:
        if lock.lock_counter == 1:
            _clear_up(place)
        yield
    finally:
        if lock.lock_counter == 1:
            path.unlink(missing_ok=True)  # while it is held: whoever opened it meanwhile sees that it is gone, and tries again
        lock.release()


def _clear_up(place: Path) -> None:
    """Ends what was begun beside a place that is held: an old folder comes back if no new one has taken its place.

    Raises:
        InputError: something else has taken its place.
    """
    partial, old = _beside(place, "writing"), _beside(place, "old")
    if os.path.lexists(old) and partial.exists():  # stopped after the old folder went and before the new one came
        if os.path.lexists(place):
            raise InputError(f"{old} was to be replaced by {place}, which something else has become: move one of them away")
        os.rename(old, place)
    for left in (old, partial):
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def _beside(place: Path, word: str) -> Path:
    return place.with_name(f".{place.name}.{word}")


def _is_device(path: Path) -> bool:
    """Also where the shell has led /dev/stdout to a file, which must stay the one that is open."""
    linked = path.is_symlink() and path.absolute().parts[1] in ("dev", "proc")
    return linked or (path.exists() and not path.is_file())


def _sync(path: Path) -> None:
    """Waits until a file, or what a folder lists, is on the disk; not every file system can do the latter."""
    handle = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
            os.fsync(handle)
    finally:
        os.close(handle)
