"""Draws accuracy against milliseconds and bytes of exported files. See vitoats/cli/front.py."""

import sys

from vitoats.cli.common import run
from vitoats.cli.front import main

if __name__ == "__main__":
    sys.exit(run(main))
