"""Runs commands one after the other, in a process of its own: ``python -m tests.commands COMMAND... [--interrupt]``.

A command is one argument, in the words of a command line. With --interrupt each compression is stopped once it has kept a
finished block, and goes on with --resume.
"""

import importlib
import shlex
import sys

from vitoats.cli import common
from vitoats.compression.resume import RunFolder

KEEP = RunFolder.write


def stop_after_the_first_block(*kept) -> None:
    KEEP(*kept)
    RunFolder.write = KEEP
    raise KeyboardInterrupt


def run(command: str, interrupt: bool) -> None:
    name, *argv = shlex.split(command)
    main = importlib.import_module(f"vitoats.cli.{name}").main
    if interrupt and name == "compress":
        RunFolder.write = stop_after_the_first_block
        assert common.run(main, argv) == 130, command
        common.log.handlers.clear()
        argv.append("--resume")
    assert common.run(main, argv) == 0, command
    common.log.handlers.clear()


if __name__ == "__main__":
    interrupt = "--interrupt" in sys.argv
    for command in sys.argv[1:]:
        if command != "--interrupt":
            run(command, interrupt)
