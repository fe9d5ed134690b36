"""Atomic writes of files and folders, and locks that let only one run at a time write to a path.

Output is first written beside its target as ``.NAME.writing`` and moved into place once it is complete. A folder that is being
replaced is briefly renamed to ``.NAME.old``. The writer holds the lock ``.NAME.lock``, which distinguishes the leftovers of a
killed run from the output of a running one. The next writer cleans up leftovers.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from vitoats.common.errors import InputError, RunError

REMEDY = "free some space or give another `output`"


@contextlib.contextmanager
def atomic_write(path: Path, remedy: str = REMEDY, part_of: Path | None = None) -> Iterator[Path]:
    """Yields the path of a hidden file beside ``path`` to write to, and moves the file into place on success.

    A device or a pipe, such as /dev/stdout, is written to directly.

    Args:
        path: the file.
        remedy: the advice in an error's message.
        part_of: the file or folder that the file belongs to. What a killed run leaves is beside that, and goes with its next
            writer.

    Raises:
        RunError: the file cannot be written.
    """
    try:
        if _is_device(path):
            yield path
            return
        target = Path(os.path.realpath(path))
        place = target if part_of is None else Path(os.path.realpath(part_of))
        partial = _beside(place, "writing")
        with hold(place, wait=True, remedy=remedy):
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
    """Yields a hidden folder beside ``folder`` to write files to, and moves it into place on success.

    Args:
        folder: the folder to write; an existing empty folder is replaced.
        overwrite: also replace a folder that is not empty.

    Raises:
        InputError: the folder is not empty, or another run is writing to it.
        RunError: the folder cannot be written; nothing is left behind, and an old folder is unchanged.
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
    """Locks a file or folder so that no other run writes to it; the lock is reentrant within the process.

    Leftovers of a killed run are cleaned up first.

    Args:
        place: the file or folder; it need not exist.
        wait: wait until another run has finished, instead of raising an error.

    Raises:
        InputError: another run is writing to it.
        RunError: the lock file cannot be written; ``remedy`` is the advice in its message.
    """
    path = Path(os.path.realpath(place.parent)) / f".{place.name}.lock"
    lock = FileLock(path, is_singleton=True)  # counts how often this process holds it
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=place.parent):  # where no file can be, the lock would be awaited for ever
            pass
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
            path.unlink(missing_ok=True)  # while still locked: a run that has opened it sees that it is gone, and tries again
        lock.release()


def remove_beside(place: Path, folder: Path) -> None:
    """Removes a folder that is no longer needed once a locked path has been written.

    It is there whole or not at all, even if the run is killed meanwhile: it goes away under a name that the next writer to the
    path clears up.

    Args:
        place: the locked file or folder.
        folder: it need not exist.
    """
    old = _beside(place, "old")
    shutil.rmtree(old, ignore_errors=True)
    with contextlib.suppress(OSError):  # there is none, or it is on another disk
        os.rename(folder, old)
    for each in (old, folder):
        shutil.rmtree(each, ignore_errors=True)


def remove_file(path: Path) -> None:
    """Removes a file, which need not exist, and what a killed writer has left beside it; leaves all if it cannot be locked."""
    if path.parent.is_dir():
        with contextlib.suppress(RunError), hold(path, wait=True):
            path.unlink(missing_ok=True)


def tidy(path: Path) -> None:
    """Removes what a killed writer has left beside a file that needs no further writing, unless another is at it."""
    if any(os.path.lexists(_beside(path, word)) for word in ("writing", "old", "lock")):
        with contextlib.suppress(InputError, RunError), hold(path):
            pass


def _clear_up(place: Path) -> None:
    """Cleans up after an interrupted write to a locked path: an old folder is restored if no new one has replaced it.

    Raises:
        InputError: something else has appeared at the path.
    """
    partial, old = _beside(place, "writing"), _beside(place, "old")
    if os.path.lexists(old) and partial.exists():  # stopped after the old folder was moved, before the new one was
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
    """Whether a path is a device, a pipe, or a link in /dev such as /dev/stdout, whose target must stay the open file."""
    linked = path.is_symlink() and path.absolute().parts[1] in ("dev", "proc")
    return linked or (path.exists() and not path.is_file())


def _sync(path: Path) -> None:
    """Flushes a file or a folder's entries to disk; not every file system supports the latter."""
    handle = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
            os.fsync(handle)
    finally:
        os.close(handle)
