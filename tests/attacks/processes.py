"""Runs commands in processes of their own, which may be killed: at a moment, or before their n-th change of the file system."""

import atexit
import importlib
import os
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from vitoats.cli import common
from vitoats.common import unfinished

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate"}
LONGEST = 600  # seconds, after which a process hangs


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Attributes:
        status: its exit status, or minus the signal that ended it.
        out, err: what it printed.
        changes: how often it changed something in the file system; 0 if it was killed.
        peak: the most bytes that were in use on the disk of ``place``; 0 if it was killed.
    """

    status: int
    out: str
    err: str
    changes: int
    peak: int

    @property
    def last(self) -> str:
        """The last line on stderr."""
        return (self.err.splitlines() or [""])[-1]


class Process:
    """A command in a copy of this process, with its caches and temporary files in its place, too."""

    def __init__(self, command: str, argv: list[str], place: Path, notes: Path, kill_before: int = 0):
        """Starts it.

        Args:
            command: the command's name.
            argv: its flags.
            place: the folder that it writes to.
            notes: a folder for what it prints.
            kill_before: the number of the change before which it is killed; 0 for none.
        """
        self._notes = Path(tempfile.mkdtemp(dir=notes))
        sys.stdout.flush()
        self.id = os.fork()
        if self.id == 0:
            status = 70
            try:
                status = _command(command, argv, place, self._notes, kill_before)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)

    def kill(self) -> None:
        """Kills it."""
        os.kill(self.id, signal.SIGKILL)

    def ended(self) -> Ended:
        """Waits for its end."""
        for _ in range(LONGEST * 500):  # no clock: a busy machine may stop both processes for a while
            if (found := os.waitpid(self.id, os.WNOHANG)) != (0, 0):
                break
            time.sleep(0.002)
        else:
            self.kill()
            found = os.waitpid(self.id, 0)
        out, err = ((self._notes / name).read_text() for name in ("out", "err"))
        counted = self._notes / "counted"
        changes, peak = map(int, counted.read_text().split()) if counted.is_file() else (0, 0)
        return Ended(os.waitstatus_to_exitcode(found[1]), out, err, changes, peak)


def _command(command: str, argv: list[str], place: Path, notes: Path, kill_before: int) -> int:
    """The life of the process; returns its exit status."""
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(notes / name, os.O_WRONLY | os.O_CREAT), descriptor)
    for folder in ("cache", "tmp"):
        (place / folder).mkdir(exist_ok=True)
    os.environ.update(XDG_CACHE_HOME=str(place / "cache"), TMPDIR=str(place / "tmp"))
    tempfile.tempdir = None
    unfinished.SECONDS = 0.0  # what takes hours elsewhere takes a moment here
    watch = _Watch(place, kill_before)
    sys.addaudithook(watch)
    status = common.run(importlib.import_module(f"vitoats.cli.{command}").main, argv)
    atexit._run_exitfuncs()
    watch.on = False
    (notes / "counted").write_text(f"{watch.changes} {watch.peak}")
    return status


class _Watch:
    """Counts what Python is about to change in the file system, and ends the process before one of these changes."""

    def __init__(self, place: Path, kill_before: int):
        self.place, self.kill_before, self.changes, self.peak, self.on = place, kill_before, 0, 0, True

    def __call__(self, event: str, args: tuple) -> None:
        if not self.on or not self._is_change(event, args):
            return
        self.changes += 1
        disk = os.statvfs(self.place)
        self.peak = max(self.peak, (disk.f_blocks - disk.f_bfree) * disk.f_frsize)
        if self.changes == self.kill_before:
            os.kill(os.getpid(), signal.SIGKILL)

    def _is_change(self, event: str, args: tuple) -> bool:
        if event == "open":
            path, _, flags = args
            return bool(flags & (os.O_WRONLY | os.O_RDWR)) and isinstance(path, str) and path.startswith(str(self.place))
        if event not in CHANGES:
            return False
        path = os.fsdecode(args[0]) if isinstance(args[0], str | bytes | os.PathLike) else ""
        return path.startswith(str(self.place)) or not os.path.isabs(path)  # rmtree names files below an open folder
